"""Rows per second and peak memory of preparing data, against TRL's own preparation: `make bench`.

The same conversations, tokenizer and patched template, from a JSONL file to tokens and labels on the disk: TRL's `SFTTrainer`
constructor (assistant-only loss, max_length 1024) with a model of almost no size, and atlas' `prepare`, which audits every row as
well. Each measurement is a process of its own with an empty cache; TRL and atlas alternate. The result goes into
outputs/figures/benchmarks.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from measured import record_benchmark

MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=Path, help="JSONL files (default: conversations of the pocket lab)")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the pocket lab's own)")
    parser.add_argument("--count", type=int, default=50_000, help="rows, the files repeated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="instead: a million short rows, without TRL")
    parser.add_argument("--child", nargs=4, metavar=("KIND", "FILE", "TOKENIZER", "PROCESSES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, file, tokenizer, processes = arguments.child
        print(json.dumps(measure(kind, file, tokenizer, int(processes))))
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = arguments.tokenizer or pocket_tokenizer(Path(folder))
        name, entry = (
            million(Path(folder), tokenizer)
            if arguments.million
            else compare(Path(folder), tokenizer, arguments.rows, arguments.count, arguments.rounds)
        )
    command = "python benchmarks/prepare.py"
    command += " --million" if arguments.million else ""
    command += f" --rows {' '.join(path.name for path in arguments.rows)}" if arguments.rows else ""
    command += " --tokenizer ..." if arguments.tokenizer else ""
    record_benchmark(name, entry, command)


def compare(
    folder: Path, tokenizer: str, files: list[Path] | None, count: int, rounds: int
) -> tuple[str, dict[str, Any]]:
    rows, source = conversations(files)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in islice(cycle(rows), count)), encoding="utf-8")
    kinds = [("trl", 1), ("atlas", 1), ("trl", 2), ("atlas", 2)]
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(rounds):
        for kind, processes in kinds:
            cache = folder / f"cache-{turn}-{kind}-{processes}"
            found.setdefault(f"{kind}, {processes}", []).append(run(kind, file, tokenizer, processes, cache))
            if kind == "atlas" and processes == 1:  # the same again, with the cache that is there now
                found.setdefault("atlas, again", []).append(run(kind, file, tokenizer, 1, cache))
            print(f"round {turn + 1}: {kind}, {processes}: {found[f'{kind}, {processes}'][-1]}", file=sys.stderr)
            subprocess.run(["rm", "-rf", str(cache)], check=True)
    ratios = {
        processes: [
            trl["seconds"] / atlas["seconds"]
            for trl, atlas in zip(found[f"trl, {processes}"], found[f"atlas, {processes}"], strict=True)
        ]
        for processes in (1, 2)
    }
    tokens = {found[name][0]["tokens"] for name in ("trl, 1", "atlas, 1")}
    return f"prepare, {source}", {
        "what": "rows/s from a JSONL file to tokens and labels on the disk: TRL's SFTTrainer, and atlas, which audits each row too",
        "source": source,
        "rows": count,
        "tokens": sorted(tokens),
        "speedup_median": {str(p): round(statistics.median(values), 2) for p, values in ratios.items()},
        "speedup_min_max": {str(p): [round(min(v), 2), round(max(v), 2)] for p, v in ratios.items()},
        "rows_per_second": {
            name: round(count / statistics.median(entry["seconds"] for entry in entries))
            for name, entries in found.items()
            if name != "atlas, again"
        },
        "second_run_seconds": round(statistics.median(entry["seconds"] for entry in found["atlas, again"]), 2),
        "peak_memory_gib": {name: round(max(e["peak_gib"] for e in entries), 2) for name, entries in found.items()},
        "rounds": rounds,
    }


def million(folder: Path, tokenizer: str) -> tuple[str, dict[str, Any]]:
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(1_000_000):
            row = {"instruction": f"What is {number} plus {number % 89}?", "output": f"It is {number + number % 89}."}
            out.write(json.dumps(row) + "\n")
    first = run("atlas, held out", file, tokenizer, 1, folder / "cache")
    again = run("atlas, held out", file, tokenizer, 1, folder / "cache")
    return "prepare, a million short rows", {
        "what": "a million short exchanges from a JSONL file to audited labels on the disk, 1 % held out, repeats looked for",
        "rows": 1_000_000,
        "tokens": first["tokens"],
        "seconds": round(first["seconds"], 1),
        "rows_per_second": round(1_000_000 / first["seconds"]),
        "peak_memory_gib": first["peak_gib"],
        "second_run_seconds": round(again["seconds"], 2),
        "second_run_peak_memory_gib": again["peak_gib"],
    }


def run(kind: str, file: Path, tokenizer: str, processes: int, cache: Path) -> dict[str, Any]:
    child = [sys.executable, __file__, "--child", kind, str(file), tokenizer, str(processes)]
    done = subprocess.run(
        child,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(kind: str, file: str, tokenizer_name: str, processes: int) -> dict[str, Any]:
    """Seconds (imports, tokenizer and model not counted), tokens that come out, peak memory of the largest process."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    if kind == "trl":
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from trl import SFTConfig, SFTTrainer

        from atlas.models.template import patch_chat_template_for_assistant_mask, stop_token

        tokenizer = patch_chat_template_for_assistant_mask(AutoTokenizer.from_pretrained(tokenizer_name))
        tokenizer.eos_token = stop_token(tokenizer)
        shape = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        arguments = SFTConfig(
            output_dir=str(Path(file).parent / "trl"),
            assistant_only_loss=True,
            max_length=MAX_LENGTH,
            dataset_num_proc=processes if processes > 1 else None,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        model = Qwen2ForCausalLM(shape)
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=file, split="train")
        prepared = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
        seconds = time.perf_counter() - began
    else:
        from atlas.auditing.gate import gate
        from atlas.config import load_config
        from atlas.data.prepare import prepare
        from atlas.models.tokenizer import load_tokenizer

        config = load_config(
            Path(__file__).parent.parent / "configs" / "sft_qwen05b.yaml",
            [
                f"model.tokenizer_name={tokenizer_name}",
                f"data.train={file}",
                f"data.num_proc={processes if processes > 1 else 'null'}",
                f"train.max_length={MAX_LENGTH}",
                *(["data.eval_fraction=0.01", "data.deduplicate=true"] if "held out" in kind else []),
                *(["data.eval_rows=10000"] if Path(file).stat().st_size > 80_000_000 and processes == 1 else []),
            ],
        ).config
        tokenizer = load_tokenizer(config)
        began = time.perf_counter()
        labeled = prepare(config, tokenizer)
        seconds = time.perf_counter() - began
        gate(config, labeled)
        prepared = labeled.dataset
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    lengths = prepared.select_columns(["input_ids"]).with_format("arrow")
    tokens = sum(len(batch["input_ids"].combine_chunks().flatten()) for batch in lengths.iter(10_000))
    return {"seconds": seconds, "tokens": tokens, "peak_gib": round(peak / 2**20, 2)}


def conversations(files: list[Path] | None) -> tuple[list[dict[str, Any]], str]:
    """Rows as messages, which TRL reads too."""
    from atlas.data.formats import conversation, detect

    if not files:
        from atlas.pocket import world

        return world.conversations(0, 5000), "pocket lab"
    rows: list[dict[str, Any]] = []
    for file in files:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        known = detect(lines[:100], file.name)
        rows += [{"messages": conversation(line, known).messages} for line in lines]
    return rows, " + ".join(file.stem for file in files)


def pocket_tokenizer(folder: Path) -> str:
    from atlas.pocket import world
    from atlas.pocket.base import train_tokenizer

    train_tokenizer(world.pretraining_texts(0, 2000)).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


if __name__ == "__main__":
    main()
