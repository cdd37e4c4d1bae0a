"""Two processes on one results folder, in random order: nothing is lost, and who cannot have a name is told by whom it is held."""

import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from atlas import lock
from atlas.errors import RunError, UserError
from atlas.eval import compare, store
from atlas.eval.stats import estimates
from atlas.scores import Record, Run, Task
from runs import full_disk

ROUNDS = 20
TASKS = ("ifeval", "gsm8k")


def scored(passed: list[float]) -> tuple[Task, list[Record]]:
    """What a task with these scores leaves: its entry for metrics.json, and its records."""
    rest = {"groups": [], "prompt": "Who?", "text": "I\u2028am.", "tokens": 3, "stopped": True}
    records = [Record(key=key, scores={"acc": score}, **rest) for key, score in enumerate(passed)]
    settings = {"version": 1, "n": len(passed), "data": "d", "generation": None, "num_fewshot": 0, "limit": None}
    return Task(**settings, chat_template=True, metrics=estimates(records)), records


def evaluate(results: Path, name: str, rng: random.Random, tasks: tuple[str, ...]) -> str:
    """What `atlas eval` does with a results folder: "done", or what it was refused with."""
    try:
        with store.claimed(results, name, 1000):
            known = [row for row in store.read_metrics(results).runs if row.name == name]
            row = known[0] if known else Run(name=name, tasks={})
            for task in tasks:
                time.sleep(rng.random() * 0.004)
                store.store(results, row, task, *scored([float(rng.random() < 0.5) for _ in range(20)]))
    except UserError as error:
        return str(error)
    return "done"


def other(work: Any, results: Path) -> tuple[multiprocessing.Process, Connection]:
    """`work` in a process of its own, that runs once per number it is sent."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def serve() -> None:
        while (number := there.recv()) is not None:
            try:
                there.send(work(results / str(number), random.Random(-number)))
            except BaseException as error:
                there.send(repr(error))
        os._exit(0)

    process = fork.Process(target=serve, daemon=True)
    process.start()
    return process, here


def test_two_evaluations_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "PATIENCE", 0)
    process, pipe = other(lambda results, rng: _late(results, rng, "x", ("gsm8k",)), tmp_path)
    refused = 0
    for number in range(1, ROUNDS + 1):
        results, rng = tmp_path / str(number), random.Random(number)
        pipe.send(number)
        mine, theirs = _late(results, rng, "x", ("ifeval",)), pipe.recv()
        done = {task for task, said in (("ifeval", mine), ("gsm8k", theirs)) if said == "done"}
        (row,) = store.read_metrics(results).runs
        assert set(row.tasks) == done
        for task in done:
            assert len(store.read_records(results, "x", task, row.tasks[task])) == 20
        for said in {mine, theirs} - {"done"}:
            refused += 1
            assert "eval/x is in use by " in said and "choose another --name" in said
    pipe.send(None)
    process.join(10)
    assert refused


def _late(results: Path, rng: random.Random, name: str, tasks: tuple[str, ...]) -> str:
    time.sleep(rng.random() * 0.012)
    return evaluate(results, name, rng, tasks)


def test_two_evaluations_of_two_names(tmp_path: Path):
    process, pipe = other(lambda results, rng: evaluate(results, "y", rng, TASKS), tmp_path)
    for number in range(1, ROUNDS + 1):
        results, rng = tmp_path / str(number), random.Random(number)
        pipe.send(number)
        assert (evaluate(results, "x", rng, TASKS), pipe.recv()) == ("done", "done")
        rows = {row.name: row for row in store.read_metrics(results).runs}
        assert {name: set(row.tasks) for name, row in rows.items()} == {"x": set(TASKS), "y": set(TASKS)}
    pipe.send(None)
    process.join(10)


def test_a_comparison_beside_an_evaluation(tmp_path: Path):
    """It sees the old results or the new ones, never rows without their records."""
    rng = random.Random(0)
    for name in ("a", "b"):
        assert evaluate(tmp_path, name, rng, TASKS) == "done"
    (tmp_path / "0").symlink_to(tmp_path)
    process, pipe = other(lambda results, rng: [_late(results, rng, "b", TASKS) for _ in range(ROUNDS)], tmp_path)
    pipe.send(0)
    seen, compared = set(), 0
    while not pipe.poll():
        found = compare.comparison(tmp_path, ["a", "b"])
        assert [each.task for each in found] == list(TASKS)
        seen.add(found[0].b.tasks[TASKS[0]].metrics["acc"].score)
        compared += 1
    assert pipe.recv() == ["done"] * ROUNDS
    assert compared > 2 and len(seen) > 1
    pipe.send(None)
    process.join(10)


def test_a_disk_that_fills_up_loses_nothing_that_was_there(tmp_path: Path):
    rng = random.Random(0)
    assert evaluate(tmp_path, "a", rng, TASKS) == "done"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (row,) = store.read_metrics(tmp_path).runs
    said = r"ifeval\.jsonl cannot be written \(File too large\): make room"
    with full_disk(100), pytest.raises(RunError, match=said):
        store.store(tmp_path, row, "ifeval", *scored([1.0] * 20))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_results_where_a_file_is(tmp_path: Path):
    (tmp_path / "results").touch()
    with (
        pytest.raises(UserError, match=r"output\.results_dir: .*results/eval/x does not take 0 MiB of results"),
        store.claimed(tmp_path / "results", "x", 0),
    ):
        pass
