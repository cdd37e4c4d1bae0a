"""What a run says of itself while it trains."""

import json
from pathlib import Path

import pytest

from runs import BASIC, broken_off, train


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
