"""How atlas' time and memory grow with rows, their length, the batch and the model, and that long runs stay flat: `make growth`.

    python benchmarks/growth.py [rows] [length] [batch] [size] [flat] [--shape ...] [--tokenizer ...]

Everything runs the command of atlas through contender.py, in a process of its own. `flat` is the pocket run of
configs/sft_pocket.yaml over many steps; it also says how much of a step is neither forward, backward nor optimizer.
"""

import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import prepare
from measured import record_benchmark, this_command
from speed import ROOT, SHAPES, WORK, Job, base_model, data_arguments, make_job, run, write_rows

LENGTHS, BATCHES, ROWS = (128, 256, 512, 1024), (1, 2, 4, 8, 16), (1_000, 10_000, 100_000, 1_000_000)
BLOCK = 50  # steps whose mean is one point of a slope


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"default: {' '.join(PARTS)}")
    data_arguments(parser)
    parser.add_argument(
        "--steps", type=int, default=5, help="of each point; the first is not counted (default: %(default)s)"
    )
    parser.add_argument("--flat-steps", type=int, default=5000)
    parser.add_argument("--most-rows", type=int, default=ROWS[-1])
    arguments = parser.parse_args(argv)
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    for name in arguments.parts:
        PARTS[name](arguments)


def _save(name: str, arguments: argparse.Namespace, what: str, entry: dict[str, Any]) -> None:
    if name in ("length", "batch"):
        name += f", {arguments.shape}"
    record_benchmark(f"growth, {name}", {"what": what, **entry}, this_command())


def rows(arguments: argparse.Namespace) -> None:
    """Preparation: seconds a row, peak memory."""
    _, tokenizer = base_model("pocket", arguments.tokenizer)
    points = []
    for count in (count for count in ROWS if count <= arguments.most_rows):
        file, cache = WORK / "many.jsonl", WORK / "caches"
        shutil.rmtree(cache, ignore_errors=True)
        conversations = prepare.conversations(arguments.rows)[0]
        with file.open("w", encoding="utf-8") as out:
            for row in itertools.islice(itertools.cycle(conversations), count):
                out.write(json.dumps(row) + "\n")
        found = prepare.run("atlas", file, tokenizer, 1, cache)
        points.append({"rows": count, **found, "microseconds_a_row": round(1e6 * found["seconds"] / count, 1)})
        print(points[-1], flush=True)
        shutil.rmtree(cache)
        file.unlink()
        _save(
            "rows", arguments, "preparation from JSONL to audited labels on the disk, one process", {"points": points}
        )


def length(arguments: argparse.Namespace) -> None:
    """Rows that all have the same length."""
    job, _ = make_job(arguments, steps=arguments.steps)
    jobs = [(count, replace(job, rows=_rows_of(job, arguments, count), max_length=count)) for count in LENGTHS]
    _train("length", arguments, "tokens in a row, all alike, 4 x 4 rows a step", jobs)


def batch(arguments: argparse.Namespace) -> None:
    """Rows in a micro-batch, one micro-batch a step."""
    job, _ = make_job(arguments, steps=arguments.steps, accumulation=1)
    job = replace(job, rows=_rows_of(job, arguments, 256), max_length=256)
    _train("batch", arguments, "rows of 256 tokens in a micro-batch", [(n, replace(job, batch=n)) for n in BATCHES])


def size(arguments: argparse.Namespace) -> None:
    """The shapes of speed.py."""
    job, _ = make_job(arguments, steps=arguments.steps)
    job = replace(job, rows=_rows_of(job, arguments, 256), max_length=256)
    jobs = [(shape, replace(job, model=base_model(shape, arguments.tokenizer)[0])) for shape in SHAPES]
    _train("size", arguments, "shapes of the model, 4 x 4 rows of 256 tokens a step", jobs)


def _train(name: str, arguments: argparse.Namespace, what: str, jobs: list[tuple[Any, Job]]) -> None:
    points = []
    for value, job in jobs:
        shutil.rmtree(WORK / "caches", ignore_errors=True)
        report = run("atlas", job)
        if "error" in report:
            points.append({name: value, "error": report["error"]})
        else:
            steps = report["steps"]
            seconds = {
                clock: round(statistics.median(b - a for a, b in itertools.pairwise(steps[clock])), 4)
                for clock in ("wall", "cpu")
            }
            tokens = statistics.mean(steps["tokens"][1:])
            points.append(
                {
                    name: value,
                    "tokens_a_step": tokens,
                    "seconds_a_step": seconds,
                    "cpu_milliseconds_a_token": round(1000 * seconds["cpu"] / tokens, 3),
                    "peak_gib": round(report["peak_gib"], 2),
                    "at_load_gib": round(report["at_load_gib"]["resident"], 2),
                }
            )
        print(points[-1], flush=True)
        _save(name, arguments, what, {"points": points})


def _rows_of(job: Job, arguments: argparse.Namespace, tokens: int) -> str:
    """Conversations joined until each has `tokens` tokens or more; train.max_length cuts them there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    turns = [
        [turn for turn in row["messages"] if turn["role"] != "system"]
        for row in prepare.conversations(arguments.rows)[0]
    ]
    supply = itertools.cycle(turns)
    long = []
    for _ in range(job.batch * job.accumulation * 4):
        messages: list[dict[str, str]] = []
        while not messages or len(tokenizer.apply_chat_template(messages, return_dict=False)) < tokens:
            messages = messages + next(supply)
        long.append({"messages": messages})
    return write_rows(f"rows-{tokens}", long)


def flat(arguments: argparse.Namespace) -> None:
    """One long pocket run: slopes of time and memory over its steps, and where a step's time goes."""
    from atlas.pocket.base import build

    lab = build(Path("outputs/pocket/lab"))
    overrides = {"model.name": str(lab.base.absolute()), "data.train": str(lab.train.absolute())}
    job = Job(
        "", "", "", "", 0, arguments.flat_steps, config=str(ROOT / "configs" / "sft_pocket.yaml"), overrides=overrides
    )
    report = run("atlas", job)
    if "error" in report:
        raise SystemExit(report["error"])
    steps = report["steps"]
    wall, cpu = ([b - a for a, b in itertools.pairwise(steps[clock])] for clock in ("wall", "cpu"))
    inside, total = report["inside"], steps["wall"][-1] - steps["wall"][0]
    shares = {name: round(seconds / total, 4) for name, seconds in inside.items()}
    entry = {
        "steps": len(steps["wall"]),
        "seconds_a_step": {"wall": round(statistics.median(wall), 5), "cpu": round(statistics.median(cpu), 5)},
        "slope_of_1000_steps": {
            "cpu_seconds_percent": _slope(cpu, 100 / statistics.mean(cpu)),
            "wall_seconds_percent": _slope(wall, 100 / statistics.mean(wall)),
            "resident_mib": _slope(steps["resident"][1:], 1024),
        },
        "share_of_time": shares,
        "share_outside": round(1 - sum(shares[name] for name in ("forward", "backward", "optimizer")), 4),
        "threads": report["threads"],
    }
    _save("flat", arguments, "configs/sft_pocket.yaml: slope over the steps, with its standard error", entry)


def _slope(values: list[float], scale: float) -> dict[str, float]:
    """Least-squares slope over 1,000 steps through the means of blocks, and its standard error. The first fifth is left out:
    allocators and caches fill there."""
    import numpy as np

    kept = values[len(values) // 5 :]
    means = [statistics.mean(kept[at : at + BLOCK]) for at in range(0, len(kept) - BLOCK + 1, BLOCK)]
    if len(means) < 4:
        return {"slope": float("nan"), "error": float("nan")}
    (slope, _), covariance = np.polyfit(np.arange(len(means)) * BLOCK / 1000, means, 1, cov=True)
    return {"slope": round(slope * scale, 4), "error": round(float(covariance[0, 0]) ** 0.5 * scale, 4)}


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "rows": rows,
    "length": length,
    "batch": batch,
    "size": size,
    "flat": flat,
}


if __name__ == "__main__":
    main()
