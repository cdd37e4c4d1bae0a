"""What a run says of itself while it trains."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import TrainerState

from atlas.config import load_config
from atlas.errors import RunError, UserError
from atlas.train.callbacks.loss_spike import LossSpike
from atlas.train.callbacks.throughput import peak
from atlas.train.run import FinishedRun, open_run
from atlas.train.sft import SFT
from rows import write_rows
from runs import BASIC, broken_off, run_arguments, together, trace, train

if TYPE_CHECKING:
    from atlas.pocket.base import PocketPaths


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_log_file_has_each_line_once_also_after_a_kill(sft_args: list[str], tmp_path: Path) -> None:
    held_out = ["data.eval_rows=16", "train.eval_strategy=steps", "train.eval_steps=2", "train.batching=pad"]
    whole = train(sft_args, *BASIC, *held_out)
    assert whole.trainer is not None
    there = log_of(whole.folder)
    assert there == whole.trainer.state.log_history
    steps = [line["step"] for line in there if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in there if "eval_loss" in line] == [2, 4, 6, 7]

    folder = broken_off(whole.folder, tmp_path / "killed", 3)
    (folder / "train_log.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 4, "lo')  # as a kill leaves it
    resumed = train(sft_args, *BASIC, *held_out, f"output.dir={folder}")
    again = log_of(resumed.folder)
    timed = ("second", "runtime", "memory")
    without = [
        [{k: v for k, v in line.items() if not any(part in k for part in timed)} for line in lines[:-1]]
        for lines in (there, again)
    ]
    assert without[0] == without[1]
    seconds = [line["seconds"] for line in again if "seconds" in line]
    assert seconds == sorted(seconds)


def test_tokens_and_padding_are_those_of_the_batches(sft_args: list[str]) -> None:
    run = train(sft_args, "train.batching=pad", "train.gradient_accumulation_steps=2")
    assert run.trainer is not None
    lines = [line for line in log_of(run.folder) if "loss" in line]
    rows = [len(row) for row in run.trainer.train_dataset["input_ids"]]
    order = [number for batch in run.trainer.get_train_dataloader().batch_sampler for number in batch]
    for number, line in enumerate(lines):
        pairs = [[rows[row] for row in order[at : at + 2]] for at in (4 * number, 4 * number + 2)]
        real, held = sum(map(sum, pairs)), sum(2 * max(pair) for pair in pairs)
        assert line["padding_share"] == pytest.approx(1 - real / held)
        assert line["peak_memory_gib"] > 0.05
    old: dict[str, float] = {"num_tokens": 0, "supervised_tokens": 0}
    for line in lines:  # both rates are of the same seconds
        tokens, supervised = (line[name] - old[name] for name in ("num_tokens", "supervised_tokens"))
        ratio = line["tokens_per_second"] / line["supervised_tokens_per_second"]
        assert ratio == pytest.approx(tokens / supervised)
        old = line


OVERFITTING = [
    *("quantization.load_in_4bit=false", "lora.lora_dropout=0", "train.warmup_steps=0", "train.learning_rate=1e-2"),
    *("data.max_rows=36", "data.eval_rows=16", "train.max_steps=-1", "train.num_train_epochs=40"),
    *("train.per_device_train_batch_size=10", "train.lr_scheduler_type=constant", "train.early_stopping_patience=3"),
    "train.save_total_limit=null",
]


def held_out_loss(base: Path, adapter: Path, rows: Iterable[dict]) -> float:
    """By plain cross entropy, of the tokens of all rows together."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    total = count = 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


shares_overfitted = pytest.mark.xdist_group("overfitted")


@pytest.fixture(scope="module")
def overfitted(lab: "PocketPaths", rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return train(run_arguments(lab.base, rows_file, tmp_path_factory.mktemp("overfitted")), *OVERFITTING)


@shares_overfitted
def test_a_run_on_twenty_rows_is_warned_of_and_stopped(overfitted: FinishedRun) -> None:
    lines, result = log_of(overfitted.folder), overfitted.manifest["result"]
    warnings = [line for line in lines if "warning" in line]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert len(warnings) == 1 and warnings[0]["warning"].startswith(f"overfitting since step {best}:")
    assert result["stopped_early"] and result["best_step"] == result["weights_of_step"] == best
    assert list(losses)[-4] == best and result["steps"] == [*losses][-1] < 80  # three evaluations after the best one
    for line in lines:
        if "eval_loss" in line:
            loss = [other["loss"] for other in lines if "loss" in other and other["step"] <= line["step"]][-1]
            assert line["eval_gap"] == pytest.approx(line["eval_loss"] - loss)


@shares_overfitted
def test_best_and_last_weights_are_both_kept_and_are_what_the_log_says(
    overfitted: FinishedRun, lab: "PocketPaths"
) -> None:
    assert overfitted.trainer is not None
    losses = [line["eval_loss"] for line in log_of(overfitted.folder) if "eval_loss" in line]
    rows = overfitted.trainer.eval_dataset
    assert held_out_loss(lab.base, overfitted.folder, rows) == pytest.approx(min(losses), abs=1e-5)
    assert overfitted.manifest["result"]["last_weights"] == "last"
    assert held_out_loss(lab.base, overfitted.folder / "last", rows) == pytest.approx(losses[-1], abs=1e-5)


@shares_overfitted
def test_an_early_stop_survives_a_kill(
    overfitted: FinishedRun, lab: "PocketPaths", rows_file: Path, tmp_path: Path
) -> None:
    steps = sorted(int(path.name.partition("-")[2]) for path in overfitted.folder.glob("checkpoint-*"))
    arguments = run_arguments(lab.base, rows_file, tmp_path)
    folder = broken_off(overfitted.folder, tmp_path / "killed", steps[-1])
    resumed = train(arguments, *OVERFITTING, f"output.dir={folder}")
    assert trace(resumed) == trace(overfitted)
    last = [run.folder / "last" / "adapter_model.safetensors" for run in (resumed, overfitted)]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert resumed.manifest["result"]["best_step"] == overfitted.manifest["result"]["best_step"]


@shares_overfitted
@pytest.mark.slow
def test_the_count_of_bad_evaluations_is_in_the_checkpoint(
    overfitted: FinishedRun, lab: "PocketPaths", rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the second bad evaluation: the next one ends the run, as it would have without the kill."""
    every = [*OVERFITTING, "train.save_strategy=epoch", "train.eval_strategy=epoch"]
    arguments = run_arguments(lab.base, rows_file, tmp_path)
    whole = train(arguments, *every)
    stop = whole.manifest["result"]["steps"]
    folder = broken_off(whole.folder, tmp_path / "killed", stop - 2)  # two steps an epoch
    resumed = train(arguments, *every, f"output.dir={folder}")
    assert resumed.manifest["result"]["resumed_from"] == f"checkpoint-{stop - 2}"
    assert trace(resumed) == trace(whole)


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
def test_two_processes_stop_early_together(
    overfitted: FinishedRun, lab: "PocketPaths", rows_file: Path, tmp_path: Path
) -> None:
    arguments = [*run_arguments(lab.base, rows_file, tmp_path), *OVERFITTING, "train.per_device_train_batch_size=5"]
    for process in together(2, "sft", *arguments):
        assert process.end() == 0, process.said()
    result = json.loads((tmp_path / "out" / "manifest.json").read_text())["result"]
    alone = overfitted.manifest["result"]
    assert [result[name] for name in ("steps", "best_step", "last_weights")] == [
        alone["steps"],
        alone["best_step"],
        "last",
    ]
    lines, there = log_of(tmp_path / "out"), log_of(overfitted.folder)
    for name in ("loss", "eval_loss", "padding_share"):
        found, expected = ([line[name] for line in of if name in line] for of in (lines, there))
        assert len(found) == len(expected) and (name == "padding_share" or found == pytest.approx(expected, abs=1e-3))
    assert [line["step"] for line in lines if "samples" in line] == [
        line["step"] for line in there if "samples" in line
    ]
    assert overfitted.trainer is not None
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    rows = overfitted.trainer.eval_dataset
    assert held_out_loss(lab.base, tmp_path / "out", rows) == pytest.approx(min(losses), abs=1e-5)
    assert held_out_loss(lab.base, tmp_path / "out" / "last", rows) == pytest.approx(losses[-1], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.early_stopping_patience=2"], "there is no held-out data"),
        (["train.early_stopping_threshold=0.1"], "set train.early_stopping_patience"),
        (["data.eval_rows=8", "train.early_stopping_patience=2", "train.eval_strategy=no"], "train.eval_strategy=no"),
        (
            ["data.eval_rows=8", "train.early_stopping_patience=2", "train.load_best_model_at_end=false"],
            "contradicts train.early_stopping_patience",
        ),
        (["train.early_stopping_patience=0"], "must be at least 1"),
    ],
)
def test_contradictions_of_early_stopping_are_refused(sft_args: list[str], more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(sft_args, *more)


def test_samples_change_nothing_of_the_training(sft_args: list[str], tmp_path: Path) -> None:
    common = [*BASIC, "data.eval_rows=16", "train.eval_strategy=steps", "train.eval_steps=3"]
    runs = {
        steps: train(sft_args, *common, f"train.sample_steps={steps}", f"output.dir={tmp_path / steps}")
        for steps in ("0", "2", "null")
    }
    assert trace(runs["0"]) == trace(runs["2"]) == trace(runs["null"])
    steps = {name: [line["step"] for line in log_of(run.folder) if "samples" in line] for name, run in runs.items()}
    assert steps == {"0": [], "2": [0, 2, 4, 6, 7], "null": [0, 3, 6, 7]}
    for run in runs.values():
        assert run.trainer is not None
    expected = [
        runs["null"].trainer.processing_class.decode(row["input_ids"]) for row in runs["null"].trainer.eval_dataset
    ]
    first = next(line["samples"] for line in log_of(runs["null"].folder) if "samples" in line)
    assert len(first) == 3
    for sample in first:
        assert sample["prompt"].endswith("<|im_start|>assistant\n") and sample["expected"].endswith("<|im_end|>")
        assert any(text.startswith(sample["prompt"] + sample["expected"]) for text in expected)


@pytest.mark.parametrize("batching", [pytest.param("pad", marks=pytest.mark.slow), "pack"])
def test_loss_and_held_out_loss_are_the_same_however_a_step_is_split(
    batching: str, sft_args: list[str], tmp_path: Path
) -> None:
    """16 rows a step, of many lengths: as 1 x 16, 4 x 4 and 16 x 1."""
    found = []
    for rows, steps in ((1, 16), (4, 4), (16, 1)):
        run = train(
            sft_args,
            *("quantization.load_in_4bit=false", "lora.lora_dropout=0", f"train.batching={batching}"),
            *("data.eval_rows=24", "train.eval_strategy=steps", "train.eval_steps=1", "train.max_steps=2"),
            *(f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={steps}"),
            *(f"train.per_device_eval_batch_size={rows}", f"output.dir={tmp_path / str(rows)}"),
        )
        lines = log_of(run.folder)
        found.append([line.get("loss", line.get("eval_loss")) for line in lines if {"loss", "eval_loss"} & {*line}])
    assert len({*found[0]}) == 4
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_a_loss_that_is_nan_names_the_step_and_its_rows(base_folder: Path, tmp_path: Path, rows_file: Path) -> None:
    """One token of one row has a broken embedding."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.save_pretrained(base)
    model = Qwen2ForCausalLM.from_pretrained(base_folder)
    model.config.tie_word_embeddings = False
    model = Qwen2ForCausalLM(model.config)
    [*_, token] = tokenizer("§")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(base)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()[:40]]
    rows[7]["messages"][-2]["content"] += " §"
    file = write_rows(tmp_path / "rows.jsonl", rows)
    more = ["quantization.load_in_4bit=false", "train.max_steps=-1", "train.num_train_epochs=2"]
    asked = load_config((arguments := run_arguments(base, file, tmp_path))[1], [*arguments[2:], *more])
    with open_run(SFT, asked, "auto") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())
        with pytest.raises(RunError) as error:
            run.fit(trainer)
    [broken] = [number for number, row in enumerate(trainer.train_dataset) if token in row["input_ids"]]
    found = re.search(
        r"the loss of step (\d+) is not finite; its rows, by their numbers in the prepared data: (.*) \(",
        str(error.value),
    )
    assert found is not None, error.value
    named = [int(number) for number in found[2].split(", ")]
    assert broken in named and len(named) == 2
    order = [number for batch in trainer.get_train_dataloader().batch_sampler for number in batch]
    assert int(found[1]) == order.index(broken) // 2 + 1


def test_steps_that_the_loss_scaler_skips_are_counted(sft_args: list[str]) -> None:
    """A scale under which fp32 overflows, on a CPU. The fused AdamW is called for such a step too, and skips by itself."""
    import torch

    asked = load_config(sft_args[1], [*sft_args[2:], "quantization.load_in_4bit=false", "train.max_steps=4"])
    with open_run(SFT, asked, "auto") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-90)
        run.fit(trainer)
        assert trainer.args.optim == "adamw_torch_fused"
        skipped = run.close(trainer)
    lines = [line for line in log_of(skipped.folder) if "loss" in line]
    counts = [line.get("skipped_steps", 0) for line in lines]
    assert counts[0] == 1 and counts == sorted(counts) and counts[-1] < 4
    without = ["grad_norm" not in line for line in lines]
    assert without == [after > before for before, after in zip([0, *counts], counts, strict=False)]
    assert skipped.manifest["result"]["lora_b_norm"] > 0


class Watched:
    """Where a meter's warnings go."""

    def __init__(self, state: TrainerState) -> None:
        self.said: list[str] = []
        self.state = state

    def warn(self, text: str) -> None:
        self.said.append(text)
        self.state.log_history.append({"step": self.state.global_step, "warning": text})


def test_a_jump_of_the_loss_is_a_spike_and_noise_is_none() -> None:
    import random

    noise = random.Random(0)
    losses = [2 * 0.99**step * (1 + noise.gauss(0, 0.05)) for step in range(200)]
    for spikes in ({}, {120: 3.0}, {60: 3.0, 61: 3.1, 150: 2.0}):
        watched = Watched(state := TrainerState())
        meter = LossSpike(watched)  # type: ignore[arg-type]
        for step, loss in enumerate(losses):
            state.global_step = step
            line = {"loss": spikes.get(step, loss)}
            meter.read(state, line)
            state.log_history.append(line | {"step": step})
        assert [text.split(":")[0] for text in watched.said] == [
            f"loss spike at step {step}" for step in spikes if step != 61
        ]


@pytest.mark.parametrize(
    ("hardware", "dtype", "tera"),
    [
        ("Tesla T4, sm_75, 15 GiB", "float16", 65),
        ("NVIDIA L4, sm_89, 22 GiB", "bfloat16", 121),
        ("NVIDIA A100-SXM4-80GB, sm_80, 79 GiB", "bfloat16", 312),
        ("NVIDIA H100 80GB HBM3, sm_90, 79 GiB", "bfloat16", 989),
        ("NVIDIA H100 PCIe, sm_90, 79 GiB", "bfloat16", 756),
        ("NVIDIA H200, sm_90, 139 GiB", "bfloat16", 989),
        ("Tesla T4, sm_75, 15 GiB", "float32", None),
        ("NVIDIA A10G, sm_86, 22 GiB", "bfloat16", None),
        ("CPU, 2 cores (AMD EPYC)", "float32", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(hardware: str, dtype: str, tera: int | None) -> None:
    assert peak(hardware, dtype) == (tera and tera * 1e12)
