"""What evaluations leave in a results folder: rows of metrics.json, and a record per prompt in eval/NAME/TASK.jsonl.

Both are read with suspicion, since they can be edited, and written whole or not at all. Of several processes one scores a name at a
time; who reads rows and records never finds the one without the other.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from atlas.errors import UserError
from atlas.eval.stats import estimates
from atlas.files import write_json, writing

SCHEMA = 1
METRICS = "metrics.json"
_AGAIN = "make room, and run the same command again"  # in the same folder: it goes on after the tasks that are there
_LONGEST_NAME = 100  # bytes: it becomes a part of file names


def name_problem(name: str) -> str | None:
    """Why results cannot have this name, which becomes a folder and a part of the plots' file names; None where they can."""
    if not name or name.startswith((".", "-", " ")) or name.endswith(" "):
        return "starts with a letter or a digit"
    if "/" in name or "\\" in name or not name.isprintable():
        return "holds no slash, line break or control character"
    return f"is no longer than {_LONGEST_NAME} bytes" if len(name.encode()) > _LONGEST_NAME else None


def _checked_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"{name!r} is no name: one {problem}")
    return name


_Name = Annotated[str, AfterValidator(_checked_name)]
_Share = Annotated[float, Field(ge=-1e-9, le=1 + 1e-9)]  # Wilson's ends are exact to the last bits only


class _Stored(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Score(_Stored):
    score: _Share
    stderr: float = Field(ge=0)
    interval: list[_Share] = Field(min_length=2, max_length=2)


class _Task(_Stored):
    version: Any
    n: int = Field(ge=1)
    data: str
    generation: dict[str, Any] | None
    num_fewshot: int
    limit: int | None
    chat_template: bool
    prompt: str | None = None
    metrics: dict[str, _Score] = Field(min_length=1)
    stop_rate: _Share | None
    mean_tokens: float | None = Field(ge=0)
    records_sha256: str


class _Row(_Stored):
    """What a row of an older version lacks was not known of it."""

    name: _Name
    method: str | None = None
    config_hash: str | None = None
    model: str | None = None
    model_revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_sha256: str | None = None
    template_sha256: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    batch_size: int | None = None
    hardware: str | None = None
    tasks: dict[_Name, _Task]


class _Record(_Stored):
    key: int | str
    scores: dict[str, _Share] = Field(min_length=1)
    groups: list[tuple[str, bool]]
    prompt: str
    text: str | None


class _Published(_Stored):
    score: _Share


class _PublishedTask(_Stored):
    metrics: dict[str, _Published]


class _Reference(_Stored):
    name: str
    source: str
    tasks: dict[str, _PublishedTask]


class _References(_Stored):
    runs: list[_Reference]


def read_metrics(results: Path) -> dict[str, Any]:
    """results/metrics.json, or an empty one. Raises `UserError`, with the place, for a file that `atlas eval` has not left so."""
    path = results / METRICS
    try:
        if not path.exists():
            return {"schema": SCHEMA, "runs": []}
        found = _json(path.read_bytes())
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"schema {found.get('schema') if isinstance(found, dict) else None}, not {SCHEMA}")
        rows = [row.model_dump() for row in TypeAdapter(list[_Row]).validate_python(found.get("runs"), strict=True)]
        names = [row["name"] for row in rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rows are called {', '.join(sorted(map(repr, twice)))}: remove one")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no metrics file of this version ({_place(error)}): mend it or move it away"
        ) from None
    return found | {"runs": rows}


def read_records(results: Path, name: str, task: str, scored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of one task, in order; `scored` is what metrics.json says of it.

    Raises `UserError` for records that are missing, damaged, or not those that were scored.
    """
    path = records_file(results, name, task)
    remedy = "score the run again (`atlas eval`)"
    try:
        text = path.read_bytes()
        records = []
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), 1):
            try:
                _json(line)  # names what pydantic's reader lets through: a key twice, NaN
                records.append(_Record.model_validate_json(line).model_dump())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {_place(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the records {path} cannot be read ({error}): {remedy}") from None
    if len(records) != scored["n"] or len({record["key"] for record in records}) != scored["n"]:
        raise UserError(f"{path} holds {len(records)} prompts, metrics.json says {scored['n']}: {remedy}")
    if hashlib.sha256(text).hexdigest() != scored["records_sha256"]:
        raise UserError(f"{path} has changed since it was scored (its sha256 is not that of metrics.json): {remedy}")
    for record in records:
        unlike = record["scores"].keys() ^ scored["metrics"].keys()
        if unlike or (not record["groups"] and any(metric.startswith("inst_") for metric in record["scores"])):
            raise UserError(f"{path}: prompt {record['key']!r} does not have the scores of metrics.json: {remedy}")
    for metric, estimate in estimates([r["scores"] for r in records], [len(r["groups"]) for r in records]).items():
        said = scored["metrics"][metric]["score"]  # its interval may be that of an older version's method
        if abs(estimate.score - said) > 1e-6:
            raise UserError(
                f"{results / METRICS}: {metric} of {name!r} is {said:.4f} there, and {estimate.score:.4f} by its records: {remedy}"
            )
    return records


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two results of one task differ, with both values; what a user sets stands first."""

    def flat(task: Mapping[str, Any]) -> dict[str, Any]:
        own = {
            key: task.get(key) for key in ("chat_template", "prompt", "limit", "num_fewshot")
        }  # older rows have no prompt
        return own | (task.get("generation") or {}) | {"version": task["version"], "data": task["data"][:12]}

    there, here = flat(a), flat(b)
    found = {key: (there.get(key), here.get(key)) for key in there | here if there.get(key) != here.get(key)}
    if "limit" in found:
        found.pop("data", None)  # it is that of the prompts within the limit
    return found


def read_references(results: Path) -> list[dict[str, Any]]:
    """Published scores (results/references.json, if there is one), which stand beside a comparison and are never part of one."""
    path = results / "references.json"
    if not path.is_file():
        return []
    try:
        return [run.model_dump() for run in _References.model_validate(_json(path.read_bytes())).runs]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: {_place(error)}. Each of its runs has a name, a source, and tasks: "
            '{"ifeval": {"metrics": {"prompt_strict": {"score": 0.31}}}}'
        ) from None


def records_file(results: Path, name: str, task: str) -> Path:
    return results / "eval" / name / f"{task}.jsonl"


@contextmanager
def claimed(results: Path, name: str, room: int) -> Iterator[None]:
    """Score `name` alone, in a folder that takes what will be written: nobody wants to find out after hours.

    `room` is the number of bytes that the records may take.
    Raises `UserError` for a name that another process is scoring, and for a folder that cannot be written to, or is full.
    """
    from atlas.lock import held

    folder = results / "eval" / name
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(room))
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"output.results_dir: {folder} cannot be made, a part of it is a file: choose another"
        ) from None
    except OSError as error:
        raise UserError(
            f"output.results_dir: {results} does not take {room / 2**20:.0f} MiB of results ({error.strerror or error}): "
            "make room, or choose another folder"
        ) from None
    finally:
        with suppress(OSError):  # where the folder could not be made
            probe.unlink()
    with held(folder, "atlas eval", "--name", "choose another --name"):
        yield


def store(results: Path, row: dict[str, Any], task: str, scored: dict[str, Any], records: str) -> None:
    """Write the records of a finished task, and put the task into `row` and the row into metrics.json. Needs the name `claimed`.

    Raises `RunError` where they cannot be written.
    """
    path = records_file(results, row["name"], task)
    content = records.encode()
    with writing(path, _AGAIN):
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(content)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    with writing(results / METRICS, _AGAIN), locked(results):
        metrics = read_metrics(results)
        entry = json.loads(json.dumps(scored | {"records_sha256": hashlib.sha256(content).hexdigest()}))
        row["tasks"] = row["tasks"] | {task: entry}
        row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        names = [known["name"] for known in metrics["runs"]]
        if row["name"] in names:
            metrics["runs"][names.index(row["name"])] = row
        else:
            metrics["runs"].append(row)
        temporary.replace(path)
        write_json(results / METRICS, metrics)


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """Rows and records as they are at one moment, between the tasks that others finish."""
    from filelock import FileLock

    if not (results / "eval").is_dir():  # nothing has been scored here
        yield
        return
    with FileLock(results / ".metrics.lock", poll_interval=0.01):  # each holds it for milliseconds
        yield


def _json(text: bytes) -> Any:
    found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    json.dumps(found, ensure_ascii=False).encode()  # raises for half a character, which nothing could print
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice in {', '.join(sorted({repr(key) for key, _ in pairs}))[:200]}")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _place(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
