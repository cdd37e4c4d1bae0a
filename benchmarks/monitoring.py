"""What it costs to watch a run: `python benchmarks/monitoring.py`.

The pocket lab's run with everything that watches it: meters, train_log.jsonl, samples (at the start, with each evaluation and at
the end) and tensorboard. The CPU time spent in them is taken beside that of the whole training, in one run, so that other work on
the machine does not count. The result goes into outputs/figures/benchmarks.json.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measured import record_benchmark, this_command

LAB = Path("outputs/pocket/lab")
spent: dict[str, float] = defaultdict(float)
_within: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lab", type=Path, default=LAB, help="(default: outputs/pocket/lab, made if it is missing)")
    arguments = parser.parse_args()
    from atlas.pocket.base import build

    if not (arguments.lab / "train.jsonl").is_file():
        build(arguments.lab, 0)
    watch_the_watchers()
    with tempfile.TemporaryDirectory() as folder:
        steps, whole = fit(arguments.lab, Path(folder))
    watching = sum(spent.values())
    entry = {
        "steps": steps,
        "cpu_ms_a_step": {"all": round(1000 * whole / steps, 2), "none": round(1000 * (whole - watching) / steps, 2)},
        "ratio": round(whole / (whole - watching), 4),
        "parts": {name: round(seconds / (whole - watching), 5) for name, seconds in sorted(spent.items())},
    }
    record_benchmark("monitoring", entry, this_command())


def fit(lab: Path, folder: Path) -> tuple[int, float]:
    """Train once; the number of steps, and the CPU seconds of the training with its evaluations."""
    from atlas.config import load_config
    from atlas.train.run import open_run
    from atlas.train.sft import SFT

    overrides = [
        *(f"model.name={lab / 'base'}", f"data.train={lab / 'train.jsonl'}", f"output.dir={folder}"),
        *("data.eval_rows=64", "train.eval_strategy=steps", "train.eval_steps=100", "train.report_to=tensorboard"),
    ]
    with open_run(SFT, load_config("configs/sft_pocket.yaml", overrides), "never") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())
        began = time.process_time()
        run.fit(trainer)
        return trainer.state.global_step, time.process_time() - began


def watch_the_watchers() -> None:
    from atlas.train.callbacks.held_out_gap import HeldOutGap
    from atlas.train.callbacks.log_file import LogFile
    from atlas.train.callbacks.loss_spike import LossSpike
    from atlas.train.callbacks.padding_share import PaddingShare
    from atlas.train.callbacks.peak_memory import PeakMemory
    from atlas.train.callbacks.samples import Samples
    from atlas.train.callbacks.skipped_steps import SkippedSteps
    from atlas.train.callbacks.throughput import Throughput
    from atlas.train.callbacks.trackers import Tracker

    for meter in (Throughput, PeakMemory, PaddingShare, SkippedSteps, HeldOutGap, LossSpike):
        for name in ("took", "read", "on_pre_optimizer_step", "on_optimizer_step"):
            if hasattr(meter, name):
                setattr(meter, name, timed("meters", getattr(meter, name)))
    for owner, name, part in (
        (LogFile, "_write", "train_log.jsonl"),
        (Samples, "_take", "samples"),
        (Tracker, "_attempt", "tensorboard"),
    ):
        setattr(owner, name, timed(part, getattr(owner, name)))


def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with counted(part):
            return method(*args, **kwargs)

    return call


@contextmanager
def counted(part: str) -> Iterator[None]:
    """What is called within counts for the outer one."""
    began, outer = time.process_time(), not _within
    _within.append(part)
    try:
        yield
    finally:
        _within.pop()
        if outer:
            spent[part] += time.process_time() - began


if __name__ == "__main__":
    main()
