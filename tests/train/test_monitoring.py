"""What a run says of itself while it trains."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from atlas.errors import UserError
from atlas.train.run import FinishedRun
from runs import BASIC, broken_off, run_arguments, trace, train

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


@pytest.fixture(scope="module")
def overfitted(lab: "PocketPaths", rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return train(run_arguments(lab.base, rows_file, tmp_path_factory.mktemp("overfitted")), *OVERFITTING)


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


def test_best_and_last_weights_are_both_kept_and_are_what_the_log_says(
    overfitted: FinishedRun, lab: "PocketPaths"
) -> None:
    assert overfitted.trainer is not None
    losses = [line["eval_loss"] for line in log_of(overfitted.folder) if "eval_loss" in line]
    rows = overfitted.trainer.eval_dataset
    assert held_out_loss(lab.base, overfitted.folder, rows) == pytest.approx(min(losses), abs=1e-5)
    assert overfitted.manifest["result"]["last_weights"] == "last"
    assert held_out_loss(lab.base, overfitted.folder / "last", rows) == pytest.approx(losses[-1], abs=1e-5)


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
