"""A run that is broken off and resumed gives what it would have given without the break, bit for bit."""

import re
import signal
import time
from pathlib import Path

import pytest

from atlas.train import sft
from atlas.train.checkpoints import checkpoints
from rows import write_rows
from runs import BASIC, FULL, Started, broken_off, trace, train

# What is trained, and after which of its steps it is broken off.
KINDS: dict[str, tuple[list[str], list[int]]] = {
    "padded, NF4, dropout": ([], [4, 7]),  # in the middle, and at the end
    "packed": (["train.packing=true", "train.max_length=256"], [4]),
    "accumulation": (["train.gradient_accumulation_steps=3"], [4]),
    "not quantised": (["quantization.load_in_4bit=false"], [4]),
    "full fine-tuning": ([*FULL, "train.gradient_accumulation_steps=2"], [4, 7]),
    # 40 rows: an epoch has 5 steps of 4 x 2; the log's lines do not fall on checkpoints. At and past the end of an epoch.
    "epochs": (
        ["data.train={rows}:40", "train.gradient_accumulation_steps=4", "train.max_steps=12", "train.logging_steps=4"],
        [5, 6],
    ),
    # 20 rows: a pass is no whole number of steps, and step 4 already reaches into the second.
    "a stream, past the first pass": (
        ["data.streaming=true", "data.train={rows}:20", "train.gradient_accumulation_steps=3"],
        [4],
    ),
    "rows of like length, past the first epoch": (
        ["train.batching=group", "data.train={rows}:9", "train.gradient_accumulation_steps=2"],
        [4, 6],
    ),
    "rows without padding, past the first epoch": (
        ["train.batching=pack", "data.train={rows}:9", "train.gradient_accumulation_steps=2"],
        [4, 6],
    ),
    "gradient checkpointing, held-out data": (
        [
            *("train.gradient_checkpointing=true", "data.train={rows}:24", "data.eval_rows=4", "train.max_steps=9"),
            *("train.eval_strategy=epoch", "train.per_device_train_batch_size=6"),
        ],
        [4, 6],
    ),
}


SLOW = {"packed", "accumulation", "a stream, past the first pass", "rows of like length, past the first epoch"}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS])
def test_resumed_run_equals_the_unbroken_one(kind: str, sft_args: list[str], rows_file: Path, tmp_path: Path):
    asked, steps = KINDS[kind]
    arguments = [*sft_args, *BASIC, *(text.format(rows=rows_file) for text in asked)]
    whole = train(arguments)
    adapter, lines = trace(whole)
    assert len({line["loss"] for line in lines if "loss" in line}) > 2
    for step in steps:
        folder = broken_off(whole.folder, tmp_path / f"broken-{step}", step)
        resumed = train(arguments, f"output.dir={folder}")
        assert trace(resumed) == (adapter, lines), step
        result, before = resumed.manifest["result"], whole.manifest["result"]
        assert result["resumed_from"] == f"checkpoint-{step}"
        same = ("steps", "supervised_tokens", "loss_first", "loss_last", "loss_mean", "eval_loss")
        assert [result[key] for key in same] == [before[key] for key in same]
        for key in {"lora_b_norm", "weights_change"} & before.keys():
            assert result[key] == before[key] > 0


def test_an_evaluation_changes_nothing_of_the_training(sft_args: list[str], rows_file: Path, tmp_path: Path):
    """Not the random numbers of dropout, nor (bitsandbytes 0.50 on a CPU with AVX512-BF16) the gradient."""
    arguments = [*sft_args, "train.max_steps=4", "lora.lora_dropout=0.1", f"data.eval={rows_file}:4"]
    plain, _ = trace(train(arguments, "train.eval_strategy='no'"))
    often, lines = trace(
        train(arguments, "train.eval_strategy=steps", "train.eval_steps=1", f"output.dir={tmp_path / 'often'}")
    )
    assert often == plain and sum("eval_loss" in line for line in lines) == 4


def stopped(arguments: list[str], line: str, seconds: float, number: signal.Signals) -> tuple[str, str]:
    """What a run says that is told to stop so many seconds after it has said `line`; within 10 seconds it has to be gone."""
    started = Started("sft", *arguments)
    started.wait_for(line)
    time.sleep(seconds)
    told = time.monotonic()
    status = started.end(number)
    out, err = started.said()
    assert status == 128 + number and time.monotonic() - told < 10, (out, err)
    return out, err


@pytest.mark.xdist_group("processes")
# Of the two, which go the same way but for their name and status, the one that machines send is always tried.
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_stop_signal_saves_and_leaves(number: signal.Signals, sft_args: list[str], tmp_path: Path):
    """In the middle of a step, which is finished first."""
    # A step of 16 micro-batches takes 0.3 s or more; no checkpoint is written but by the signal.
    slow = ["train.gradient_accumulation_steps=16", "train.max_steps=3", "lora.lora_dropout=0.1"]
    whole = train([*sft_args, *slow])
    arguments = [*sft_args, *slow, f"output.dir={tmp_path / 'stopped'}"]
    out, err = stopped(arguments, "step 1/3", 0.05, number)
    assert "step 2/3" in out and "step 3/3" not in out and "Traceback" not in err
    assert f"{number.name}: this step is finished and saved, then the run stops\n" in out  # at once
    folder = tmp_path / "stopped"
    assert f"stopped by {number.name} after step 2/3: {folder / 'checkpoint-2'} is whole" in err
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "manifest.json").exists()
    resumed = train(arguments)
    assert resumed.manifest["result"]["resumed_from"] == "checkpoint-2"
    assert trace(resumed) == trace(whole)


@pytest.mark.xdist_group("processes")
def test_a_stop_signal_cuts_an_evaluation_which_the_resumed_run_makes_up(
    sft_args: list[str], rows_file: Path, tmp_path: Path
):
    from atlas.pocket import world

    held_out = write_rows(tmp_path / "held_out.jsonl", world.conversations(2, 120))
    slow = [
        f"data.eval={held_out}",
        "train.eval_strategy=epoch",
        f"data.train={rows_file}:8",
        "train.num_train_epochs=2",
    ]
    arguments = [*sft_args, *slow, "train.max_steps=-1", "lora.lora_dropout=0.1"]
    folder = tmp_path / "stopped"
    out, err = stopped([*arguments, f"output.dir={folder}"], "step 4/8", 0.1, signal.SIGTERM)
    assert "held-out loss" not in out.partition("step 4/8")[2] and f"{folder / 'checkpoint-4'} is whole" in err
    resumed, whole = train(arguments, f"output.dir={folder}"), train(arguments)
    assert trace(resumed) == trace(whole) and sum("eval_loss" in line for line in trace(whole)[1]) == 2


def test_checkpoints_by_the_clock(sft_args: list[str]):
    run = train([*sft_args, "checkpoint.every_minutes=0.0001", "train.save_total_limit=null"])
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    rarely = train([*sft_args, "checkpoint.every_minutes=10", f"output.dir={run.folder.with_name('rarely')}"])
    assert checkpoints(rarely.folder) == []


def test_a_run_stops_after_so_many_hours_and_goes_on(sft_args: list[str], capsys):
    """For machines with a limit: the clock is a stop signal with an exit status of its own."""
    arguments = [*sft_args, "train.max_steps=1000000", "train.logging_steps=1000"]
    folder, steps = Path(sft_args[4].partition("=")[2]), []
    for seconds in (3, 0.001):  # of the second nothing is left when training begins
        assert sft.main([*arguments, f"checkpoint.stop_after_hours={seconds / 3600}"]) == 142
        out, err = capsys.readouterr()
        found = re.search(r"stopped by checkpoint.stop_after_hours=\S+ after step (\d+)/1000000: (\S+) is whole", err)
        assert found and "the same command resumes from it" in err, err
        steps.append(int(found[1]))
        assert found[2] == str(folder / f"checkpoint-{steps[-1]}")
    assert 0 < steps[0] <= steps[1] <= steps[0] + 1 and f"resume from {folder / f'checkpoint-{steps[0]}'}" in out
