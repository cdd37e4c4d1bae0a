"""atlas against stock TRL and LLaMA-Factory on the same work: tokens per second, memory, time to the first step, losses.

    make speed                                              at toy size, the pocket lab's rows and tokenizer (minutes)
    make speed ROWS="A.jsonl B.jsonl" TOKENIZER=FOLDER      the shape of Qwen2.5-0.5B on real rows (hours on two cores)
    make speed ARGS="--phase dpo"                           pairs: atlas against stock DPOTrainer, from the same adapter
    make factory                                            first: LLaMA-Factory's environment, so that it takes part

The base model has random weights: speed and memory do not depend on them, and nothing has to be downloaded. Each contender runs in
a process of its own, in each round twice: with empty caches, then again for one step with the caches that are there now. The order
turns round with every round. A contender is written NAME+OPTION+...; contender.py says which there are. All train the same recipe:
NF4 with double quantisation, LoRA r=16 on seven projections without dropout, float32, loss on the assistant's turns, AdamW at a
constant learning rate. TRL gets atlas' patched chat template through its tokenizer, so that its labels are the same ones.

After each run the figures so far are written to outputs/figures/benchmarks.json; each run by itself to outputs/bench/runs.jsonl.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contender import ALPHA, CONTENDERS, RANK, TARGETS
from measured import record_benchmark, this_command
from prepare import conversations, pocket_tokenizer

ROOT = Path(__file__).parent.parent
WORK = Path("outputs/bench")
FACTORY = Path("outputs/factory/bin/python")
# Widths are multiples of 64, the block of NF4. The vocabulary is the tokenizer's; qwen05b is exact with Qwen2.5's (151,936).
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"pocket": (128, 384, 4, 4, 4), "60m": (640, 1728, 12, 10, 10), "qwen05b": (896, 4864, 24, 14, 2)}
QWEN_VOCABULARY = 151_936
DEFAULT = {
    "sft": ["trl", "trl+nockpt", "trl+nockpt+fp32", "atlas+pad", "atlas"],
    "dpo": ["trl", "trl+nockpt", "trl+model", "atlas+pad", "atlas"],
}
WITH_FACTORY = ["factory", "factory+nockpt", "factory+pack+nockpt", "factory+neat+nockpt"]
LOSSES = [
    ("atlas+pad", "trl+nockpt+fp32"),
    ("atlas+pad", "trl"),
]  # the same rows in the same order; TRL's adapter is bf16


@dataclass(frozen=True)
class Job:
    """What a contender is asked to train."""

    model: str
    tokenizer: str
    """The model's own; `marked` is the same with markers in its chat template."""
    marked: str
    rows: str
    """JSONL with `messages`, or pairs with `prompt`, `chosen` and `rejected`."""
    row_tokens: float
    """Tokens of a row, on average; of a pair both sides."""
    steps: int
    phase: str = "sft"
    adapter: str | None = None
    """Folder of the adapter that both train on."""
    batch: int = 4
    accumulation: int = 4
    max_length: int = 1024
    learning_rate: float = 2e-4
    seed: int = 42
    attention: str = "sdpa"
    config: str = str(ROOT / "configs" / "sft_qwen05b.yaml")
    overrides: dict[str, Any] | None = None
    """Of atlas' config, in the place of all of the above."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--phase", choices=DEFAULT, default="sft", help="what is trained (default: %(default)s)")
    parser.add_argument(
        "--contenders", nargs="+", help=f"default: {' '.join(DEFAULT['sft'])}, and LLaMA-Factory if it is there"
    )
    parser.add_argument(
        "--steps", type=int, default=6, help="of each run; the first is not counted (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--once", action="store_true", help="no second start")
    arguments = parser.parse_args(argv)
    for name in ("steps", "rounds", "batch", "accumulation"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if unknown := [name for name in arguments.contenders or () if name.split("+")[0] not in CONTENDERS]:
        parser.error(f"--contenders: {', '.join(unknown)} is none of {', '.join(CONTENDERS)}")
    names = arguments.contenders or DEFAULT[arguments.phase]
    if not arguments.contenders and arguments.phase == "sft" and FACTORY.exists():
        names = names + WITH_FACTORY
    job, source = make_job(arguments, steps=arguments.steps, batch=arguments.batch, accumulation=arguments.accumulation)
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(arguments.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            caches = WORK / "caches"
            shutil.rmtree(caches, ignore_errors=True)
            first = run(name, job, caches)
            if not arguments.once and "error" not in first:
                again = run(name, job, caches, steps=1)
                first |= {"second": {key: again.get(key) for key in ("first_step", "parts", "error")}}
            found.setdefault(name, []).append(first)
            shutil.rmtree(caches, ignore_errors=True)
            print(f"round {turn + 1}: {name}: {said(first)}", flush=True)
            entry = {"what": __doc__.splitlines()[0] if __doc__ else "", "source": source, "shape": arguments.shape}
            entry |= {
                "job": shown_job(job),
                "rounds_done": min(len(found.get(of, ())) for of in names),
                "contenders": summary(found),
            }
            entry |= {"losses": losses(found, LOSSES)}
            name_of = "speed" if arguments.phase == "sft" else f"speed of {arguments.phase}"
            record_benchmark(f"{name_of}, {arguments.shape}, {source}", entry, this_command(), show=False)
    print(json.dumps(entry, indent=1))


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and rows."""
    parser.add_argument("--shape", choices=SHAPES, default="pocket")
    parser.add_argument("--rows", nargs="+", type=Path, help="JSONL files (default: conversations of the pocket lab)")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the pocket lab's own)")
    parser.add_argument("--tokens", nargs=2, type=int, default=(30, 512), help="rows of this length (default: 30 512)")
    parser.add_argument("--count", type=int, default=1000, help="rows in all (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=1024)


def _float32(model: Path) -> Path:
    return model.with_name(f"{model.name}-float32")


def make_job(arguments: argparse.Namespace, **given: Any) -> tuple[Job, str]:
    """Model, tokenizers and rows in outputs/bench, and the job on them; what the rows are."""
    from transformers import AutoTokenizer

    model, marked = base_model(arguments.shape, arguments.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(model)
    phase = getattr(arguments, "phase", "sft")
    rows, source = (pairs if phase == "dpo" else conversations)(arguments.rows)
    low, high = arguments.tokens
    random.Random(0).shuffle(rows)
    kept, tokens = [], []
    for row in rows:
        sides = [row["prompt"] + row[side] for side in ("chosen", "rejected")] if phase == "dpo" else [row["messages"]]
        lengths = [len(tokenizer.apply_chat_template(side, return_dict=False)) for side in sides]
        if low <= max(lengths) <= high:
            kept.append(row)
            tokens.append(sum(lengths))
        if len(kept) == arguments.count:
            break
    given |= {"phase": phase, "max_length": arguments.max_length, "row_tokens": statistics.mean(tokens)}
    if phase == "dpo":
        (WORK / "dpo.yaml").write_text("phase: dpo\nbase: null\n", encoding="utf-8")
        given |= {"adapter": some_adapter(model), "config": str((WORK / "dpo.yaml").absolute())}
    return Job(model, model, marked, write_rows("rows", kept), **given), source


def pairs(files: Sequence[Path] | None) -> tuple[list[dict[str, Any]], str]:
    """Rows with prompt, chosen and rejected as messages, which TRL reads too."""
    if files:
        lines = [line for file in files for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        columns = ("prompt", "chosen", "rejected")
        rows = [{name: row[name] for name in columns} for row in map(json.loads, lines)]
        return rows, " + ".join(file.stem for file in files)
    talks, source = conversations(None)
    return [
        {"prompt": mine["messages"][:-1], "chosen": mine["messages"][-1:], "rejected": other["messages"][-1:]}
        for mine, other in itertools.pairwise(talks)
        if mine["messages"][-1] != other["messages"][-1]
    ], source


def some_adapter(model: str) -> str:
    """The folder of an adapter with random numbers on a model: as large as those of a trained one, and none of them zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = Path(f"{model}-adapter")
    if not (folder / "adapter_model.safetensors").exists():
        torch.manual_seed(1)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        tuned.save_pretrained(folder)
    return str(folder)


def base_model(shape: str, tokenizer_name: str | None) -> tuple[str, str]:
    """Folders of a model with random weights and its tokenizer, and of that tokenizer with markers in its chat template."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from atlas.models.template import patch_chat_template_for_assistant_mask

    WORK.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or pocket_tokenizer(WORK))
    tokenizer.eos_token = "<|im_end|>"  # of a base model it is the pad token
    vocabulary = QWEN_VOCABULARY if len(tokenizer) > 100_000 else len(tokenizer)
    model, marked = WORK / f"{shape}-{vocabulary}", WORK / f"marked-{vocabulary}"
    if not (model / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=32_768,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **dict(zip(WIDTHS, SHAPES[shape], strict=True)),
        )
        random_model = Qwen2ForCausalLM(config).to(torch.bfloat16)  # as Qwen2.5 is published
        random_model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        for folder in (model, _float32(model)):
            random_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            random_model.to(torch.float32)
    patch_chat_template_for_assistant_mask(AutoTokenizer.from_pretrained(model)).save_pretrained(marked)
    return str(model.absolute()), str(marked.absolute())


def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
    """Path of a JSONL file in outputs/bench that holds `rows`."""
    file = WORK / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file.absolute())


def run(name: str, job: Job, caches: Path = WORK / "caches", **changed: Any) -> dict[str, Any]:
    """One contender's run: what its meter says, or how it failed. `caches`: all that a second start finds again."""
    contender, *options = name.split("+")
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = (
        asdict(job) | {"contender": contender, "options": options, "folder": str((folder / "out").absolute())} | changed
    )
    if "fa2" in options:
        given["attention"] = "flash_attention_2"
    python = sys.executable
    if contender == "factory":
        python = str(FACTORY.absolute())  # not resolved: the link is what makes it an environment
        if not Path(
            "/dev/nvidia0"
        ).exists():  # on a CPU it computes in the checkpoint's dtype, and bf16 is 5 times slower there
            given["model"] = given["tokenizer"] = str(_float32(Path(job.model)))
    if contender != "atlas" and {"pack", "neat"} & {*options}:  # as many packs as hold the others' rows, on average
        given["accumulation"] = max(1, round(job.batch * job.accumulation * job.row_tokens / job.max_length))
        given["batch"] = 1
    if contender == "trl":
        given["tokenizer"] = job.marked
    given |= {"out": str((folder / "report.json").absolute()), "began": time.time()}
    environment = os.environ | {
        "HF_HOME": str((caches / "hf").absolute()),
        "HF_DATASETS_CACHE": str((caches / "datasets").absolute()),
        "XDG_CACHE_HOME": str((caches / "user").absolute()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "OMP_WAIT_POLICY": "PASSIVE",  # atlas sets it by itself; here the others have it too
    }
    child = [python, str(Path(__file__).with_name("contender.py")), json.dumps(given)]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        report = {"error": " ".join((done.stderr or done.stdout)[-300:].split()), "status": done.returncode}
        (WORK / f"failed-{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    else:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    with (WORK / "runs.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps({"name": name, **given, **report}) + "\n")
    return report


def speed(report: dict[str, Any], clock: str = "wall", what: str = "tokens") -> float | None:
    """Real tokens per second over the steps after the first."""
    steps = report.get("steps", {"tokens": []})
    if len(steps["tokens"]) < 2:
        return None
    return float(sum(steps[what][1:]) / (steps[clock][-1] - steps[clock][0]))


def summary(found: dict[str, list[dict[str, Any]]], against: str = "trl") -> dict[str, Any]:
    """Medians and spread of each contender over the rounds, and its ratios to `against`, taken within each round."""
    return {name: _of_one(reports, found.get(against, [])) for name, reports in found.items()}


def _of_one(reports: list[dict[str, Any]], rival: list[dict[str, Any]]) -> dict[str, Any]:
    whole = [report for report in reports if "error" not in report]
    if not whole:
        return {"error": reports[-1]["error"]}
    entry: dict[str, Any] = {"rounds": len(whole)}
    for clock in ("wall", "cpu"):
        entry[f"tokens_per_{clock}_second"] = spread([speed(report, clock) for report in whole])
        pairs = [(speed(mine, clock), speed(theirs, clock)) for mine, theirs in zip(reports, rival, strict=False)]
        entry[f"{clock}_ratio"] = spread([mine / theirs for mine, theirs in pairs if mine and theirs])
    entry["supervised_per_wall_second"] = spread([speed(report, what="supervised") for report in whole])
    entry["peak_gib"] = spread([report["peak_gib"] for report in whole])
    if "peak_gpu_gib" in whole[0]:
        entry["peak_gpu_gib"] = spread([report["peak_gpu_gib"] for report in whole])
    entry["at_load_gib"] = {name: spread([r["at_load_gib"].get(name) for r in whole]) for name in ("peak", "resident")}
    starts = {
        "first_start": whole,
        "second_start": [r["second"] for r in whole if (r.get("second") or {}).get("parts")],
    }
    for start, runs in starts.items():
        if runs:
            entry[start] = {clock: spread([r["first_step"][clock] for r in runs]) for clock in ("wall", "cpu")}
            entry[start]["parts"] = {
                part: round(statistics.median(r["parts"].get(part, 0.0) for r in runs), 2) for part in runs[0]["parts"]
            }
    again = [[((r.get("second") or {}).get("first_step") or {}).get("wall") for r in side] for side in (reports, rival)]
    entry["second_start_ratio"] = spread(
        [mine / theirs for mine, theirs in zip(*again, strict=False) if mine and theirs]
    )
    steps = whole[0]["steps"]
    for name in ("tokens", "supervised", "positions"):
        entry[f"{name}_of_steps"] = [int(value) for value in steps[name]]
    entry["losses"] = [round(value, 6) for value in steps["loss"]]
    entry["threads"] = whole[0]["threads"]
    return entry


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, minimum and maximum."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = {"median": statistics.median(known), "min": min(known), "max": max(known)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def losses(found: dict[str, list[dict[str, Any]]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """How far the losses of two contenders are apart, step by step, and whether both have trained the same tokens in each."""
    known = {name: next((r["steps"] for r in reports if "steps" in r), None) for name, reports in found.items()}
    entries = []
    for pair in pairs:
        one, other = (known.get(name) for name in pair)
        if one and other:
            apart = max(abs(a - b) for a, b in zip(one["loss"], other["loss"], strict=True))
            same = all(one[name] == other[name] for name in ("tokens", "supervised"))
            entries.append({"of": pair, "same_tokens_each_step": same, "largest_difference": float(f"{apart:.3g}")})
    return entries


def shown_job(job: Job) -> dict[str, Any]:
    """The job without the paths of this machine."""
    return {
        name: value
        for name, value in asdict(job).items()
        if name not in ("model", "tokenizer", "marked", "rows", "config", "adapter")
    }


def said(report: dict[str, Any]) -> str:
    if "error" in report:
        return f"failed: {report['error']}"
    rate, cpu = speed(report), speed(report, "cpu")
    text = f"{rate:.0f} tokens/s, {cpu:.0f} per CPU-second, " if rate and cpu else ""
    second = (report.get("second") or {}).get("first_step")
    again = f" (again {second['wall']:.1f} s)" if second else ""
    return f"{text}peak {report['peak_gib']:.2f} GiB, first step after {report['first_step']['wall']:.1f} s{again}"


if __name__ == "__main__":
    main()
