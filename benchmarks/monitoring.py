"""What it costs to watch a run: `python benchmarks/monitoring.py`.

The pocket lab's run is trained with everything that watches it (meters, train_log.jsonl, samples at the start, with each evaluation
and at the end, tensorboard) and with nothing of it, in turns, in one process. Compared are CPU seconds of the whole training,
evaluations included, by the median of the turns. The result goes into outputs/figures/benchmarks.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from measured import record_benchmark, this_command

LAB = Path("outputs/pocket/lab")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--lab", type=Path, default=LAB, help="(default: outputs/pocket/lab, which is made if it is missing)"
    )
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    from atlas.pocket.base import build

    if not (arguments.lab / "train.jsonl").is_file():
        build(arguments.lab, 0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        steps, _ = fit(arguments.lab, Path(folder) / "warm", watched=True)
        for turn in range(arguments.turns):
            for watched in (True, False) if turn % 2 else (False, True):
                steps, taken = fit(arguments.lab, Path(folder) / f"{turn}{watched}", watched)
                seconds[watched].append(taken)
                print(f"turn {turn} watched {watched}: {taken:.2f} CPU-seconds", flush=True)
    all_of_it, none = (statistics.median(seconds[watched]) for watched in (True, False))
    entry = {
        "steps": steps,
        "turns": arguments.turns,
        "cpu_ms_a_step": {"all": round(1000 * all_of_it / steps, 2), "none": round(1000 * none / steps, 2)},
        "ratio": round(all_of_it / none, 4),
        "ratios_of_turns": sorted(round(a / b, 4) for a, b in zip(seconds[True], seconds[False], strict=True)),
    }
    record_benchmark("monitoring", entry, this_command())


def fit(lab: Path, folder: Path, watched: bool) -> tuple[int, float]:
    """Train once; the number of steps, and the CPU seconds of the training alone."""
    from atlas.config import load_config
    from atlas.train.callbacks.log_file import LogFile
    from atlas.train.run import Run, open_run
    from atlas.train.sft import SFT

    overrides = [
        *(f"model.name={lab / 'base'}", f"data.train={lab / 'train.jsonl'}", f"output.dir={folder}"),
        *("data.eval_rows=64", "train.eval_strategy=steps", "train.eval_steps=100"),
        *(["train.report_to=tensorboard"] if watched else ["train.report_to=none", "train.sample_steps=0"]),
    ]
    kept = Run._meters, LogFile.on_train_begin
    if not watched:
        Run._meters = lambda self, trainer: []  # type: ignore[method-assign]
        LogFile.on_train_begin = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    try:
        with open_run(SFT, load_config("configs/sft_pocket.yaml", overrides), "never") as run:
            run.prepare()
            trainer = run.trainer(run.load_base_model())
            began = time.process_time()
            run.fit(trainer)
            return trainer.state.global_step, time.process_time() - began
    finally:
        Run._meters, LogFile.on_train_begin = kept  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
