"""Out of memory: a micro-batch is trained in two halves, and the run computes what it would have computed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atlas.errors import RunError
from atlas.models.adapters import base_of
from atlas.train.halving import halves
from atlas.train.run import FinishedRun, open_run
from atlas.train.sft import SFT
from runs import FULL, broken_off, loaded, trace, train

LINE = ("loss", "grad_norm", "supervised_tokens", "num_tokens", "epoch")


def run_with_little_memory(arguments: list[str], *, room: int | None, step: int = 2) -> FinishedRun:
    """A run whose GPU, from the given step on, has room for so many tokens: the backward pass of a larger micro-batch breaks off
    when it has reached the first layer, so that the gradients of the second have been changed."""
    with open_run(SFT, loaded(arguments), "never") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())

        def look(module, inputs, output):
            if room is None or trainer.state.global_step + 1 < step or not trainer.model.training:
                return
            if output.shape[0] * output.shape[1] > room:
                output.register_hook(no_room)

        base_of(trainer.model).model.layers[0].register_forward_hook(look)
        run.fit(trainer)
        return run.close(trainer)


def no_room(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 1 GiB")


PADDED, PACKED = ["train.max_length=128"], ["train.max_length=128", "train.packing=true"]
WHOLE = [*PADDED, *FULL, "train.learning_rate=1e-4"]


@pytest.mark.parametrize("kind", [PADDED, PACKED, WHOLE], ids=["padded", "packed", "full"])
def test_halves_give_the_loss_and_gradient_of_the_whole(
    kind: list[str], sft_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [*sft_args, "lora.lora_dropout=0", *kind, "train.gradient_accumulation_steps=2", "train.max_steps=4"]
    arguments += ["train.per_device_train_batch_size=4"]
    whole = run_with_little_memory(arguments, room=None)
    capsys.readouterr()
    split = run_with_little_memory([*arguments, f"output.dir={tmp_path / 'split'}"], room=300)
    said = capsys.readouterr().out
    assert said.count("out of memory") == 1
    assert "out of memory in step 2 (tried to allocate 2.50 GiB)" in said
    assert "set train.per_device_train_batch_size=2 train.gradient_accumulation_steps=4" in said
    lines = [[line for line in run.trainer.state.log_history if "loss" in line] for run in (whole, split)]
    assert len(lines[0]) == 4
    for expected, got in zip(*lines, strict=True):
        assert [got[key] for key in LINE] == pytest.approx([expected[key] for key in LINE], rel=1e-6)
    for expected, got in zip(whole.trainer.model.parameters(), split.trainer.model.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert split.manifest["result"]["supervised_tokens"] == whole.manifest["result"]["supervised_tokens"]


def test_a_resumed_run_goes_on_with_halves(sft_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*sft_args, *PADDED, "train.per_device_train_batch_size=4", "train.max_steps=4", "train.save_steps=1"]
    arguments += ["train.save_strategy=steps", "train.save_total_limit=null", "lora.lora_dropout=0.1"]
    unbroken = run_with_little_memory(arguments, room=300)
    folder = broken_off(unbroken.folder, tmp_path / "broken", 3)
    resumed = train([*arguments, f"output.dir={folder}"])
    assert "in two halves, as since step 2" in capsys.readouterr().out
    assert resumed.manifest["result"]["halved_from_step"] == 2 and trace(resumed) == trace(unbroken)


@pytest.mark.parametrize(
    ("room", "more", "said", "remedy"),
    [
        (100, [], "there is no room for half of a micro-batch", "batch_size=1 train.gradient_accumulation_steps=4"),
        (150, ["train.halve_on_oom=false"], "there is no room for a micro-batch", "batch_size=2 train.gradient_acc"),
        (50, ["train.per_device_train_batch_size=1"], "there is no room for a micro-batch", "lower train.per_device"),
    ],
    ids=["halves do not fit", "switched off", "one row"],
)
def test_a_run_that_cannot_be_split_ends_with_one_error(
    room: int, more: list[str], said: str, remedy: str, sft_args: list[str]
):
    arguments = [*sft_args, "train.per_device_train_batch_size=4", "train.max_length=128", "train.save_strategy=steps"]
    with pytest.raises(RunError) as raised:
        run_with_little_memory([*arguments, "train.save_steps=1", *more], room=room)
    text = str(raised.value)
    assert text.startswith("out of memory in step 2: " + said)
    assert "checkpoint-1 is whole" in text and remedy in text
    assert "train.gradient_checkpointing=true, with which this run resumes, or begin anew in another output.dir" in text


LIMITED = """
import re, resource, sys
from pathlib import Path
from transformers import TrainerCallback
from atlas.train.run import open_run
from atlas.train.sft import SFT
from runs import loaded

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and float(sys.argv[1]):
            resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int(float(sys.argv[1])), -1))

with open_run(SFT, loaded(sys.argv[2:]), "never") as run:
    run.prepare()
    trainer = run.trainer(run.load_base_model())
    trainer.add_callback(Limit())
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run.fit(trainer)
    print("needed", status("VmHWM") - before)
    run.close(trainer)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux'")
def test_memory_that_really_runs_out(sft_args: list[str], tmp_path: Path):
    """The limit leaves less than what the step needs."""
    more = [
        "train.per_device_train_batch_size=64",
        "train.max_steps=2",
        "train.logging_steps=1",
        "train.max_length=256",
    ]

    def train(room: float, name: str) -> str:
        command = [sys.executable, "-c", LIMITED, str(room), *sft_args, *more, f"output.dir={tmp_path / name}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    free = train(0, "free")
    needed = int(re.search(r"needed (\d+)", free)[1])
    limited = train(0.85 * needed, "limited")
    assert "out of memory" not in free
    assert limited.count("out of memory in step 1 (tried to allocate") == 1
    losses = [[float(loss) for loss in re.findall(r"loss (\d+\.\d+) ", out)] for out in (free, limited)]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=2e-4) and len(losses[0]) == len(losses[1])


def test_documents_without_padding_are_split_between_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    bounds = torch.tensor([0, 3, 5, 10], dtype=torch.int32)
    batch = {"input_ids": torch.arange(10)[None], "position_ids": positions, "max_length_q": 5, "cu_seq_lens_q": bounds}
    first, second = halves(batch)
    assert first["input_ids"].tolist() == [[0, 1, 2, 3, 4]] and second["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert first["cu_seq_lens_q"].tolist() == [0, 3, 5] and second["cu_seq_lens_q"].tolist() == [0, 5]
    assert (first["max_length_q"], second["max_length_q"]) == (3, 5)
    assert len(halves({"input_ids": torch.ones(1, 9), "position_ids": torch.arange(9)[None]})) == 1
