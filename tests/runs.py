"""Runs of a few seconds on the tiny model."""

import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas.config import load_config
from atlas.eval.stats import estimate
from atlas.models.weights import weight_files
from atlas.train import dpo, sft
from atlas.train.callbacks import samples
from atlas.train.run import FinishedRun
from rows import ROOT

if TYPE_CHECKING:
    import numpy as np
    import torch

# Most runs take samples before and after training. With replies of 48 tokens these took longer than the training itself.
samples.TOKENS = 6


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


def pair_arguments(parent: "TrainedRun", rows: Path | str, folder: Path) -> list[str]:
    """Arguments of a run on pairs that goes on from the adapter of another one; more overrides may follow."""
    folder.mkdir(exist_ok=True)
    config = folder / "dpo.yaml"
    config.write_text("phase: dpo\nbase: null\ntrain: {report_to: none, logging_steps: 1, max_steps: 3}\n")
    return [
        *["--config", str(config), f"model.name={parent.base}", f"model.adapter={parent.folder}"],
        *[f"data.train={rows}", f"output.dir={folder / 'dpo'}", f"output.results_dir={folder / 'results'}"],
        *["train.per_device_train_batch_size=2", "train.learning_rate=1e-3", "train.max_length=256"],
        "train.sample_steps=0",
    ]


def loaded(arguments: list[str]):
    return load_config(arguments[1], arguments[2:])


def train(arguments: list[str], *more: str) -> FinishedRun:
    return sft.train(load_config(arguments[1], [*arguments[2:], *more]))


def train_pairs(arguments: list[str], *more: str) -> FinishedRun:
    return dpo.train(load_config(arguments[1], [*arguments[2:], *more]))


def trace(run: FinishedRun) -> tuple[bytes, list[dict]]:
    """The trained weights, and every line of the log with losses, learning rates, accuracies and token counts."""
    assert run.trainer is not None
    timed = ("runtime", "second", "memory", "mfu")
    lines = [
        {k: v for k, v in line.items() if not any(part in k for part in timed)}
        for line in run.trainer.state.log_history
    ]
    return weight_files(run.folder)[0].read_bytes(), [line for line in lines if {"loss", "eval_loss"} & {*line}]


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


FULL = ["lora=null", "quantization.load_in_4bit=false"]


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


# A process of a test is a copy of one that has imported all of this: `atlas sft` takes seven seconds for that, a copy no time.
# Tests that start processes are in the group "processes", so that one worker has them all. The server does not fork this process,
# because the threads of OpenMP and of the stand-in for the Hub do not survive a fork.
LIBRARIES = ("torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "lm_eval.api.model")
# These read the environment when they are imported, so a copy reads it anew.
SETTINGS = ("huggingface_hub.constants", "datasets.config")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*LIBRARIES, *SETTINGS, "atlas.train.sft_trainer", "atlas.train.preflight"])


def _run(command: tuple[str, ...], environment: dict[str, str], folder: Path, output: list[Path]) -> None:
    from huggingface_hub import constants, hf_api

    gc.freeze()  # as in conftest.py
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background of a shell has it ignored
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout.reconfigure(line_buffering=True)
    for name in SETTINGS:
        importlib.reload(sys.modules[name])
    hf_api.api.endpoint = constants.ENDPOINT
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        from atlas.cli import main

        sys.argv = ["atlas", *command]
        sys.exit(main())


class Started:
    """A process that runs `atlas ...`, or `-c CODE ...` as python has it. What it says goes to files, or to a terminal."""

    def __init__(
        self,
        *command: str,
        environment: dict[str, str] | None = None,
        folder: Path = ROOT,
        terminal: str | None = None,
    ) -> None:
        self.command = command
        self.place = tempfile.TemporaryDirectory()
        self.files = [Path(terminal or Path(self.place.name, name)) for name in ("out", "err")]
        arguments = (command, environment or dict(os.environ), folder, self.files)
        self.process = SERVER.Process(target=_run, args=arguments)
        self.began = time.monotonic()
        self.process.start()

    def said(self) -> list[str]:
        """What stands on stdout and stderr until now."""
        return [file.read_text(encoding="utf-8") if file.exists() else "" for file in self.files]

    def wait_for(self, text: str) -> None:
        while text not in self.said()[0]:
            assert self.process.is_alive(), self.said()
            time.sleep(0.01)

    def end(self, signal: int | None = None) -> int:
        """Send the signal, wait for the process to end, and give its exit status as a shell does."""
        if signal is not None:
            os.kill(self.process.pid, signal)
        self.process.join(120)
        status = self.process.exitcode
        assert status is not None, self.said()
        return 128 - status if status < 0 else status


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def together(count: int, *command: str) -> list[Started]:
    """The processes of one launch of `atlas ...`, as a launcher starts them, but copies of one that has imported all of it."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(n), "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(count)} for n in range(count)]
    return [Started(*command, environment=environment() | meeting | rank) for rank in ranks]


TYPES = ("punctuation:no_comma", "change_case:english_lowercase", "startend:quotation")


def add_run(results: Path, name: str, passed: "np.ndarray", **changes: Any) -> dict[str, Any]:
    """A run of `passed` (prompts x 2 instructions) on ifeval, as `atlas eval` writes it."""
    records = []
    for key, (first, second) in enumerate(passed.tolist()):
        groups = [[TYPES[key % 3], bool(first)], [TYPES[(key + 1) % 3], bool(second)]]
        scores = {"prompt_strict": float(first and second), "inst_strict": (first + second) / 2}
        asked = f"<|im_start|>user\nPrompt {key} | <b>?<|im_end|>\n<|im_start|>assistant\n"
        records.append(
            {
                "key": key,
                "scores": scores,
                "groups": groups,
                "prompt": asked,
                "text": f"{name} says\u2028\x85\u2029 {key}.\x1b[2J",  # line breaks of Unicode, none of JSONL; clears a screen
                "tokens": 5,
            }
            | {"stopped": True}
        )
    path = results / "eval" / name / "ifeval.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    strict = estimate([r["scores"]["prompt_strict"] for r in records])
    inst = estimate([2 * r["scores"]["inst_strict"] for r in records], [2] * len(records))
    task = {
        "version": 4.0,
        "n": len(records),
        "data": "d" * 64,
        "generation": {"max_gen_toks": 1280, "do_sample": False},
        "num_fewshot": 0,
        "limit": None,
        "chat_template": True,
        "metrics": {
            name: {"score": e.score, "stderr": e.stderr, "interval": list(e.interval)}
            for name, e in (("prompt_strict", strict), ("inst_strict", inst))
        },
        "stop_rate": 0.9,
        "mean_tokens": 5.0,
        "records_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    noted = {"dtype": "float32", "quantization": None, "hardware": "CPU", "batch_size": 16, "template_sha256": "t"}
    row = {
        "name": name,
        **{key: changes.pop(key, value) for key, value in noted.items()},
        "tasks": {"ifeval": task | changes},
    }
    file = results / "metrics.json"
    metrics = json.loads(file.read_text()) if file.is_file() else {"schema": 1, "runs": []}
    metrics["runs"].append(row)
    file.write_text(json.dumps(metrics))
    return row
