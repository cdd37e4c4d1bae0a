"""What evaluations leave in a results folder: rows of metrics.json, and a record per prompt in eval/NAME/TASK.jsonl.

Both can be edited by hand, so reading checks them, and they are written whole or not at all. Of several processes one scores a name
at a time. Who reads rows and records never finds the one without the other.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from atlas.errors import UserError
from atlas.eval.stats import estimates
from atlas.files import digest, write_text, writing
from atlas.lock import held
from atlas.scores import ALL_KEYS, Metrics, Published, Record, Run, Stored, Task, first_problem

METRICS = "metrics.json"
PIPELINE = "pipeline.json"
"""What a pipeline has come to, beside it."""
_AGAIN = "make room, and run the same command again"  # in the same folder: it continues after the tasks that are there


class PublishedTask(Stored):
    """Scores of a task as a paper prints them."""

    metrics: dict[str, Published]


class Reference(Stored):
    """A model whose scores somebody has published."""

    name: str
    source: str
    tasks: dict[str, PublishedTask]


class _References(Stored):
    model_config = ALL_KEYS

    runs: list[Reference]


def read_metrics(results: Path) -> Metrics:
    """results/metrics.json; empty where there is none. Raises `UserError`, with the place, for a file that is not as written."""
    path = results / METRICS
    try:
        if not path.exists():
            return Metrics(schema=1)
        metrics = Metrics.model_validate_json(path.read_bytes())
        names = [run.name for run in metrics.runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows are called {', '.join(map(repr, twice))}: remove one")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_problem(error)}): correct it, or move it away") from None
    return metrics


def read_records(results: Path, name: str, task: str, scored: Task) -> list[Record]:
    """The records of one task, in order. `scored` is what metrics.json says of it; its intervals, which may be those of an older
    version, are computed again.

    Raises `UserError` for records that are missing, damaged, or not those that were scored.
    """
    path = records_file(results, name, task)
    remedy = "score the run again (`atlas eval`)"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != scored.records_sha256:
            raise ValueError("its sha256 is not the one in metrics.json: it was changed after it was scored")
        records = [Record.model_validate_json(line) for line in content.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"the records {path} cannot be used ({first_problem(error)}): {remedy}") from None
    keys = {record.key for record in records}
    same = all(record.scores.keys() == scored.metrics.keys() for record in records)
    counted = all(record.weight(metric) for record in records for metric in record.scores)
    if not (len(records) == len(keys) == scored.n and same and counted):
        raise UserError(f"{path} does not have the {scored.n} prompts and the metrics of metrics.json: {remedy}")
    found = estimates(records)
    for metric, estimate in found.items():
        said = scored.metrics[metric].score
        if abs(estimate.score - said) > 1e-6:
            raise UserError(
                f"{results / METRICS}: {metric} of {name!r} is {said:.4f} there, and {estimate.score:.4f} by its records: {remedy}"
            )
    scored.metrics = found
    return records


def read_references(results: Path) -> list[Reference]:
    """Published scores (results/references.json, if there is one), which are shown beside a comparison and are never part of it."""
    path = results / "references.json"
    if not path.is_file():
        return []
    try:
        return _References.model_validate_json(path.read_bytes()).runs
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {first_problem(error)}. Each of its runs has a name, a source, and tasks: "
            '{"ifeval": {"metrics": {"prompt_strict": {"score": 0.31}}}}'
        ) from None


def records_file(results: Path, name: str, task: str) -> Path:
    return results / "eval" / name / f"{task}.jsonl"


@contextmanager
def claimed(results: Path, name: str, room: int) -> Iterator[None]:
    """Score `name` alone, in a folder that has room for the `room` bytes of records: better to know before hours of work.

    Raises `UserError` for a name that another process is scoring, and for a folder that cannot be written to, or is full.
    """
    folder = results / "eval" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(room))
    except OSError as error:
        raise UserError(
            f"output.results_dir: {folder} does not take {room / 2**20:.0f} MiB of results ({error.strerror or error}): "
            "make room, or choose another folder"
        ) from None
    with held(folder, "atlas eval", "--name", "choose another --name"):
        yield


def store(results: Path, run: Run, task: str, scored: Task, records: Sequence[Record]) -> None:
    """Write the records of a finished task, and put the task into `run` and the run into metrics.json. Needs the name `claimed`.

    Raises `RunError` where they cannot be written.
    """
    path = records_file(results, run.name, task)
    lines = "".join(json.dumps(record.model_dump(), ensure_ascii=False) + "\n" for record in records)
    with writing(path, _AGAIN), locked(results):
        by_name = {known.name: known for known in read_metrics(results).runs}
        write_text(path, lines)
        scored.records_sha256 = digest(lines)
        run.tasks[task] = scored
        run.date = datetime.now(UTC).isoformat(timespec="seconds")
        metrics = Metrics(schema=1, runs=[*(by_name | {run.name: run}).values()])
        with writing(results / METRICS, _AGAIN):
            write_text(results / METRICS, metrics.model_dump_json(indent=1, by_alias=True) + "\n")


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """Rows and records as they are at one moment, between the tasks that others finish."""
    if not (results / "eval").is_dir():  # nothing has been scored here
        yield
        return
    with FileLock(results / ".metrics.lock", poll_interval=0.01):  # each holds it for milliseconds
        yield
