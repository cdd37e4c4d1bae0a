"""Runs of a few seconds on the tiny model."""

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from atlas.config import load_config
from atlas.train import sft
from atlas.train.run import FinishedRun
from rows import ROOT

if TYPE_CHECKING:
    import torch


def run_arguments(base: Path, rows: Path, folder: Path) -> list[str]:
    """Arguments of a run of a few seconds on the tiny model; more overrides may follow."""
    return [
        "--config",
        str(ROOT / "configs" / "sft_pocket.yaml"),
        f"model.name={base}",
        f"data.train={rows}",
        f"output.dir={folder / 'out'}",
        f"output.results_dir={folder / 'results'}",
        "train.max_steps=3",
        "train.per_device_train_batch_size=2",
        "train.logging_steps=1",
    ]


def loaded(arguments: list[str]):
    return load_config(arguments[1], arguments[2:])


def train(arguments: list[str], *more: str) -> FinishedRun:
    return sft.train(load_config(arguments[1], [*arguments[2:], *more]))


def trace(run: FinishedRun) -> tuple[bytes, list[dict]]:
    """The adapter, and every line of the log with losses, learning rates, accuracies and token counts."""
    assert run.trainer is not None
    lines = [
        {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
        for line in run.trainer.state.log_history
    ]
    return (run.folder / "adapter_model.safetensors").read_bytes(), [
        line for line in lines if {"loss", "eval_loss"} & {*line}
    ]


def broken_off(whole: Path, to: Path, step: int) -> Path:
    """A copy of a finished run's folder as a kill after checkpoint-`step` would have left it."""
    shutil.copytree(whole, to)
    for path in [*to.iterdir()]:
        number = path.name.removeprefix("checkpoint-")
        if path.is_file():
            path.unlink()
        elif not number.isdigit() or int(number) > step:
            shutil.rmtree(path)
    assert (to / f"checkpoint-{step}").is_dir()
    return to


BASIC = [
    "train.max_steps=7",
    "train.save_strategy=steps",
    "train.save_steps=1",
    "train.save_total_limit=null",
    "lora.lora_dropout=0.1",
]


def environment() -> dict[str, str]:
    """Of a child process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def without_weights(sft_args: list[str], folder: Path) -> Path:
    """A run's base model, which cannot be loaded: its file of weights is sound, but holds none of them."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(sft_args[2].partition("=")[2], folder)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes: writing more is an `OSError`, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TrainedRun(NamedTuple):
    """A finished run: its folder, its base model, and what the model in memory answered to `text`."""

    folder: Path
    base: Path
    text: str
    logits: "torch.Tensor"
