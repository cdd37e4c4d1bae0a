"""`atlas run`: several phases in a row, each from the one before, scored after each, with one table of all at the end.

    atlas run --config configs/pipeline_qwen05b.yaml [--stage NAME|all] [key=value ...] [STAGE.key=value ...]

A pipeline file lists stages: the config of a phase each, and what it starts from. Every stage and every evaluation is a process of
its own, the same command that a user would type, so that its memory comes back. There is no second bookkeeping: what is finished
says so itself and is skipped, what was broken off resumes. The same command again goes on wherever the pipeline was stopped.
"""

import contextlib
import difflib
import io
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from atlas.cli import COMMANDS, command
from atlas.config import SCHEMAS, Config, EvalTask, LoadedConfig, is_path, load_config
from atlas.config.load import find_config, phase_named, read_yaml
from atlas.console import say, size
from atlas.errors import DONE, RunError, StoppedError, UserError
from atlas.eval.compare import Comparison, as_markdown, as_text, compared, plot
from atlas.eval.store import METRICS, PIPELINE, read_metrics, read_references
from atlas.files import exists, read_object, write_json, write_text, writing
from atlas.launch import command_line
from atlas.report.scores import pipeline_rows
from atlas.scores import Run, name_problem, text_table

ALL, BASE = "all", "base"
_AGAIN = "run the same command again: what is finished is skipped, and a stage that was broken off resumes"
PROCESSES = multiprocessing.get_context("spawn")
_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM}


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StageEntry(_File):
    """One stage, as the file says it."""

    name: str = Field(min_length=1)
    """How the pipeline calls it."""
    config: str = Field(min_length=1)
    """Of its phase: a path relative to the pipeline file, or the name of a config that atlas brings along."""
    start: str | None = Field(default=None, alias="from", min_length=1)
    """A stage above, or a base model (Hub id or folder); null: what its config says."""


class PipelineFile(_File):
    """A pipeline file."""

    stages: list[StageEntry] = Field(min_length=1)
    """What is trained, in this order."""
    tasks: list[EvalTask] | None = Field(default=None, min_length=1)
    """What base model and stages are scored on; null: eval.tasks of the stages' configs, which then must be the same."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return (
            [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )


@dataclass(frozen=True)
class Stage:
    """One stage, with its config loaded."""

    name: str
    path: Path
    overrides: tuple[str, ...]
    loaded: LoadedConfig
    parent: "Stage | None"
    """The stage that it starts from; None: a base model."""

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output.dir)

    @property
    def run(self) -> str:
        """How the results call it, here as with `atlas eval`."""
        return self.folder.absolute().name

    def manifest(self) -> dict[str, Any]:
        return read_object(self.folder / "manifest.json")


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline file and a command line say."""

    path: Path
    stages: tuple[Stage, ...]

    @property
    def base(self) -> str:
        """How the results call the base model."""
        return f"{Path(self.config.model.name).resolve().name}-base"

    @property
    def config(self) -> Config:
        """Of the first stage, with which the base model is scored."""
        return self.stages[0].config

    @property
    def results(self) -> Path:
        return Path(self.config.output.results_dir)


@command("run")
def main(arguments: Namespace) -> int:
    pipeline = load_pipeline(arguments.config, arguments.overrides)
    run_pipeline(pipeline, arguments.stage)
    return DONE


# What the file says


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file and the config of each stage. `overrides` are `key=value` for all stages or `STAGE.key=value` for one.

    Raises `UserError`, with the place, for what is wrong in the file or in a config, and for stages that cannot be compared.
    """
    path = find_config(Path(path))
    file = _read(path)
    names = [entry.name for entry in file.stages]
    for entry in file.stages:
        _refuse_name(path, entry.name, names)
    of_stage: dict[str, list[str]] = {name: [] for name in names}
    for text in overrides:
        first, _, rest = text.partition(".")
        if first in of_stage:
            of_stage[first].append(rest)
        elif "=" in first or first in Config.model_fields:
            for given in of_stage.values():
                given.append(text)
        else:
            near = difflib.get_close_matches(first[:100], [*names, *Config.model_fields], n=1, cutoff=0)[0]
            raise UserError(
                f"command line: {text!r}: there is no stage or section {first[:100]!r}; did you mean {near!r}?"
            )
    stages: list[Stage] = []
    for entry in file.stages:
        stages.append(_stage(path, file, entry, of_stage[entry.name], stages))
    _refuse_incomparable(path, stages)
    return Pipeline(path, tuple(stages))


def _read(path: Path) -> PipelineFile:
    tree = read_yaml(path)
    if "stages" not in tree and any(key in Config.model_fields for key in tree):
        raise UserError(
            f"{path}: this is the config of a phase, and no pipeline: `atlas {phase_named(path)} --config {path}` trains it"
        )
    try:
        return PipelineFile.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n       ".join(_explained(path, problem) for problem in error.errors())) from None


def _explained(path: Path, problem: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
    if problem["type"] != "extra_forbidden":
        return f"{path}: {place or 'the file'}: {problem['msg'].removeprefix('Value error, ')}"
    kinds = {1: PipelineFile, 3: EvalTask if place.startswith("tasks") else StageEntry}
    known = [field.alias or name for name, field in kinds.get(len(problem["loc"]), StageEntry).model_fields.items()]
    above, _, last = place.rpartition(".")
    near = difflib.get_close_matches(last[:100], known, n=1, cutoff=0)[0]
    config = "; the values of a phase stand in its own config" if last in Config.model_fields else ""
    return f"{path}: unknown key {place!r}; did you mean {f'{above}.{near}'.lstrip('.')!r}?{config}"


def _refuse_name(path: Path, name: str, names: Sequence[str]) -> None:
    problem = name_problem(name)
    if names.count(name) > 1:
        problem = "belongs to one stage alone"
    elif name in (ALL, BASE, *Config.model_fields) or "." in name or "=" in name:
        problem = (
            f"has no `.` or `=`, and is not {ALL}, {BASE} or a section of a config ({', '.join(Config.model_fields)})"
        )
    if problem:
        raise UserError(f"{path}: stages: {name!r} cannot name a stage: such a name {problem}")


def _stage(path: Path, file: PipelineFile, entry: StageEntry, given: Sequence[str], above: Sequence[Stage]) -> Stage:
    beside = path.parent / entry.config
    brought = find_config(Path(entry.config))
    config = beside if exists(beside) or not exists(brought) else brought
    overrides = [*given]
    if file.tasks is not None:
        overrides.append(f"eval.tasks={json.dumps([task.model_dump(exclude_defaults=True) for task in file.tasks])}")
    where = f"{path}: stage {entry.name}"
    parent = next((stage for stage in above if stage.name == entry.start), None)
    if parent is None and entry.start is not None:
        others = [each.name for each in file.stages]
        if entry.start in others:
            raise UserError(
                f"{where}: it starts from {entry.start!r}, which does not stand above it: change their order"
            )
        near = difflib.get_close_matches(entry.start[:100], others)
        if near and not is_path(entry.start):
            raise UserError(f"{where}: from: there is no stage {entry.start!r}; did you mean {near[0]!r}?")
        overrides.append(f"model.name={entry.start}")
    try:
        if parent is not None:
            overrides += _from(parent, phase_named(config))
        loaded = load_config(config, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Stage(entry.name, config, tuple(overrides), loaded, parent)


def _from(parent: Stage, phase: str) -> list[str]:
    """The values of a stage that starts from another one."""
    folder, model = parent.folder, parent.config.model
    if phase not in SCHEMAS:
        return []  # the config says what is wrong
    if parent.config.lora is None:  # a whole model, which is the base of what comes after it
        return [f"model.name={folder}", *(["model.adapter=none"] if SCHEMAS[phase].continues else [])]
    if not SCHEMAS[phase].continues:
        raise UserError(
            f"phase {phase} starts from a base model, and stage {parent.name} leaves an adapter: take `from` out, or train "
            f"{parent.name} with lora: null"
        )
    revision = [f"model.revision={model.revision}"] if model.revision else []
    return [f"model.name={model.name}", *revision, f"model.adapter={folder}"]


def _refuse_incomparable(path: Path, stages: Sequence[Stage]) -> None:
    """Raises `UserError` where two stages share a folder or a name in the results, or are not scored in the same way."""
    first = stages[0]
    for number, stage in enumerate(stages):
        for other in stages[:number]:
            if stage.run == other.run:
                raise UserError(
                    f"{path}: stages {other.name} and {stage.name} both have output.dir {stage.folder}, or one of that name: "
                    f"the results call a stage by it, so give them different ones"
                )
        if stage.config.output.results_dir != first.config.output.results_dir:
            raise UserError(
                f"{path}: stage {stage.name} has output.results_dir {stage.config.output.results_dir}, stage {first.name} "
                f"{first.config.output.results_dir}: one folder holds all scores of a pipeline"
            )
        of_both = stage.config.eval.model_dump(mode="json"), first.config.eval.model_dump(mode="json")
        if different := [key for key in of_both[0] if of_both[0][key] != of_both[1][key]]:
            key = different[0]
            raise UserError(
                f"{path}: eval.{key} is {of_both[0][key]} in stage {stage.name} and {of_both[1][key]} in stage {first.name}: "
                "scores are compared only where all were asked in the same way. `tasks:` in the pipeline file, or "
                "eval.KEY=VALUE on the command line, holds for all stages"
            )


# What there is to do


class Outlook(NamedTuple):
    """One stage before anything runs."""

    name: str
    phase: str
    start: str
    steps: str
    tokens: str
    memory: str
    state: str


def look(pipeline: Pipeline) -> list[Outlook]:
    """Preflight of every stage, its data prepared and audited, the prompts of the evaluation there. Needs all libraries, so that it
    runs in a process of its own. Raises one error with everything that is wrong."""
    from atlas.eval.tasks import load_task
    from atlas.terminal import quiet_libraries

    quiet_libraries()
    found: list[Outlook] = []
    problems: list[UserError | RunError] = []
    hidden = io.StringIO()  # each stage says all of it again, when its turn comes
    for stage in pipeline.stages:
        say(f"looking at stage {stage.name}: {stage.path}", flush=True)
        try:
            with contextlib.redirect_stdout(hidden):
                found.append(_outlook(stage, {name for name, *_, state in found if state == "finished"}))
        except (UserError, RunError) as error:
            problems.append(type(error)(f"stage {stage.name}: {error}"))
    asked = pipeline.config.eval
    try:
        for task in asked.tasks:
            load_task(task, asked.data.get(task.name), asked.chat_template)
    except UserError as error:
        problems.append(error)
    if problems:
        kind = RunError if all(isinstance(each, RunError) for each in problems) else UserError
        raise kind("nothing is trained yet, because\n       - " + "\n       - ".join(map(str, problems)))
    return found


def _outlook(stage: Stage, finished: Set[str]) -> Outlook:
    from atlas.train.checkpoints import Identity, checkpoint_to_resume, finished_manifest
    from atlas.train.plan import Amount, Steps
    from atlas.train.preflight import preflight

    waits = stage.parent is not None and stage.parent.name not in finished
    if waits and stage.parent is not None and stage.parent.config.lora is None:
        # Its base model does not exist yet: only what does not need it can be looked at.
        return Outlook(
            stage.name, stage.config.phase, stage.parent.name, "?", "?", "?", f"waits for {stage.parent.name}"
        )
    ready = preflight(_without_parent(stage) if waits else stage.loaded, "never" if waits else "auto")
    ready.refuse_failures()
    config = ready.loaded.config
    rows = ready.phase.rows(config, ready.tokenizer)
    known = "?" if config.data.streaming else Amount.of(rows)
    steps = Steps.of(config, known, 1)
    state = f"waits for {stage.parent.name}" if waits and stage.parent else "to be trained"
    if not waits:
        identity = Identity.of(
            ready.loaded,
            rows.fingerprint,
            ready.plan.hardware,
            ready.base.content,
            ready.strategy.name,
            ready.parent_sha256,
        )
        if finished_manifest(ready.folder, identity) is not None:
            state = "finished"
        elif checkpoint := checkpoint_to_resume(ready.folder, "auto", identity):
            state = f"goes on from {checkpoint.name}"
    return Outlook(
        stage.name,
        config.phase,
        stage.parent.name if stage.parent else config.model.name,
        f"{steps.in_all:,}" if steps.in_all else "?",
        f"{known.tokens * (steps.epochs or 1):,.0f}" if isinstance(known, Amount) else known,
        size(ready.memory),
        state,
    )


def _without_parent(stage: Stage) -> LoadedConfig:
    """The stage's config while the adapter that it starts from is not there: with a new one of its kind, and the tokenizer that it
    will bring."""
    from atlas.models.parent import refuse_other_settings

    assert stage.parent is not None
    before, settings = stage.parent.config.model, stage.parent.config.lora
    assert settings is not None
    refuse_other_settings(stage.loaded, settings, f"of stage {stage.parent.name}")
    model: dict[str, str | None] = {"adapter": "none"}
    if stage.config.model.tokenizer_name is None:
        model |= {"tokenizer_name": before.tokenizer_name, "tokenizer_revision": before.tokenizer_revision}
    updated = stage.config.model.model_copy(update=model)
    return replace(stage.loaded, config=stage.config.model_copy(update={"model": updated, "lora": settings}))


# The run


def run_pipeline(pipeline: Pipeline, only: str = ALL) -> dict[str, Any]:
    """Train what is not finished, score and compare all, and return what `results/pipeline.json` then holds.

    `only`: a stage, which is trained alone; those that it starts from must be finished. Raises `UserError`, before anything is
    trained, for what cannot end well; and `UserError`, `RunError` or `StoppedError` with the name of the stage that ended so.
    """
    names = [stage.name for stage in pipeline.stages]
    if only not in (ALL, *names):
        near = difflib.get_close_matches(only[:100], [ALL, *names], n=1, cutoff=0)[0]
        raise UserError(
            f"--stage {only}: {pipeline.path} has no such stage; did you mean {near!r}? ({', '.join(names)}, {ALL})"
        )
    if only != ALL:
        pipeline = replace(pipeline, stages=_chain(next(s for s in pipeline.stages if s.name == only)))
    began = time.monotonic()
    say(f"pipeline {pipeline.path}: {' -> '.join([BASE, *(stage.name for stage in pipeline.stages)])}", flush=True)
    with ProcessPoolExecutor(1, PROCESSES) as pool:
        try:
            outlook = pool.submit(look, pipeline).result()
        except BrokenProcessPool:
            raise RunError(
                "the look at the stages was ended from outside (the system does that when memory runs out)"
            ) from None
    say(_plan(pipeline, outlook), flush=True)
    for each in outlook:
        if only not in (ALL, each.name) and each.state != "finished":
            raise UserError(
                f"--stage {only}: it starts from stage {each.name}, which is not finished ({each.state}): run --stage {each.name} "
                f"first, or leave --stage out"
            )
    _score(pipeline, None)
    for stage in pipeline.stages:
        _train(stage, began)
        _score(pipeline, stage)
        for found in _compared(pipeline, [stage], with_base=False):
            say(f"\n{as_text(found, read_references(pipeline.results))}", flush=True)
    return _close(pipeline)


def _chain(stage: Stage) -> tuple[Stage, ...]:
    return (*(_chain(stage.parent) if stage.parent else ()), stage)


def _plan(pipeline: Pipeline, outlook: Sequence[Outlook]) -> str:
    tasks = ", ".join(task.name for task in pipeline.config.eval.tasks)
    head = ["stage", "phase", "starts from", "steps", "tokens", "memory", ""]
    return (
        f"{text_table([head, *outlook], '<<<>>><')}\n"
        f"  scored on {tasks} after each, the base model too: {pipeline.results / METRICS}\n"
    )


def _train(stage: Stage, began: float) -> None:
    """Run the stage's phase. It says itself whether it is finished, and resumes by itself."""
    hours = stage.config.checkpoint.stop_after_hours
    overrides = [*stage.overrides]
    if hours is not None:  # of the pipeline: a machine that is taken away does not ask which stage it is
        left = hours - (time.monotonic() - began) / 3600
        if left <= 0:
            raise StoppedError(
                f"checkpoint.stop_after_hours={hours:g}: stopped before stage {stage.name}: {_AGAIN}", signal.SIGALRM
            )
        overrides.append(f"checkpoint.stop_after_hours={left:.6f}")
    module = COMMANDS[stage.config.phase].place
    _process(f"stage {stage.name}", module, "--config", str(stage.path), *overrides)


def _score(pipeline: Pipeline, stage: Stage | None) -> None:
    """Score a finished stage, or the base model. Scores that are there of the same weights are kept."""
    of = stage or pipeline.stages[0]
    what = ["--name", pipeline.base, "--base"] if stage is None else ["--name", stage.run]
    if stage is not None:
        known = next((run for run in read_metrics(pipeline.results).runs if run.name == stage.run), None)
        manifest = stage.manifest()
        if known is not None and (known.adapter_sha256, known.model_sha256) != (
            manifest.get("adapter_sha256"),
            manifest.get("model_sha256"),
        ):
            say(
                f"the scores of {stage.run} in {pipeline.results / METRICS} are those of other weights: they are replaced"
            )
            what.append("--replace")
    name = BASE if stage is None else stage.name
    _process(f"evaluation of {name}", "atlas.eval.run", "--config", str(of.path), *what, *of.overrides)


def _process(what: str, module: str, *arguments: str) -> None:
    """Run a command as a process of its own, and pass signals on to it. Raises an error that names `what` where it fails."""
    say(f"\n== {what}", flush=True)
    running: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        # The terminal sends Ctrl-C to all of its processes.
        if running is not None and not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            running.send_signal(number)

    with _handled(pass_on):
        running = start(module, *arguments)
        if received:  # before it was there
            running.send_signal(received[0])
        status = running.wait()
    ended = -status if status < 0 else status - 128
    if status == DONE and not received:
        return
    if received or ended in _STOPS:
        number = received[0] if received else ended
        raise StoppedError(f"{what} was stopped by {signal.Signals(number).name}: {_AGAIN}", number)
    if status < 0:
        killed = " (the system does that when memory runs out)" if ended == signal.SIGKILL else ""
        raise RunError(f"{what} was ended by {signal.Signals(ended).name}{killed}: {_AGAIN}")
    kind = UserError if status == 2 else RunError
    raise kind(f"{what} failed (status {status}); it has said why above. Mend that, and {_AGAIN}")


def start(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """`python -m module arguments`, in the process group of this process, so that what ends the group ends all of it."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments])


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# What it has come to


def _compared(pipeline: Pipeline, stages: Sequence[Stage], *, with_base: bool = True) -> list[Comparison]:
    """Each stage with what it starts from, and with the base model."""
    pairs = [(stage.parent.run if stage.parent else pipeline.base, stage.run) for stage in stages]
    if with_base:
        pairs += [(pipeline.base, stage.run) for stage in stages if stage.parent]
    return compared(pipeline.results, pairs)


def _close(pipeline: Pipeline) -> dict[str, Any]:
    """Write all comparisons, and print the one table."""
    found = _compared(pipeline, pipeline.stages)
    names = {pipeline.base: BASE, **{stage.run: stage.name for stage in pipeline.stages}}
    runs = {run.name: run for each in found for run in (each.a, each.b)}
    report = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "pipeline": pipeline.path.name,
        "stages": [_said_of(stage) for stage in pipeline.stages],
        "runs": {name: run for run, name in names.items()},
        "scores": _scores(runs, names),
        "comparisons": [
            {"task": each.task, "metric": each.main, "a": names[each.a.name], "b": names[each.b.name], "n": each.n}
            | each.difference.as_json()
            for each in found
        ],
    }
    result, page = pipeline.results / PIPELINE, pipeline.results / "comparison.md"
    with writing(result):
        write_json(result, report)
        write_text(page, as_markdown(found, read_references(pipeline.results)))
        plots = plot([each for each in found if each.a.name == pipeline.base], pipeline.results / "plots")
    say("\n" + table(report))
    say(f"written: {result}, {page}, {', '.join(map(str, plots))}")
    return report


def _said_of(stage: Stage) -> dict[str, Any]:
    manifest = stage.manifest()
    weights: dict[str, Any] = {key: manifest[key] for key in ("adapter_sha256", "model_sha256") if key in manifest}
    result = {key: manifest.get("result", {}).get(key) for key in ("steps", "loss_first", "loss_last")}
    start = stage.parent.name if stage.parent else stage.config.model.name
    said: dict[str, Any] = {"name": stage.name, "phase": stage.config.phase, "config": stage.path.name, "from": start}
    return {**said, "folder": str(stage.folder), "config_hash": manifest.get("config_hash"), **weights, **result}


def _scores(runs: Mapping[str, Run], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Task -> column -> its scores, in the form of results/metrics.json."""
    tasks = dict.fromkeys(task for run in runs.values() for task in run.tasks)
    keys = {"n", "metrics", "stop_rate", "mean_tokens"}
    return {
        task: {
            name: runs[run].tasks[task].model_dump(include=keys)
            for run, name in names.items()
            if task in runs[run].tasks
        }
        for task in tasks
    }


def table(report: Mapping[str, Any]) -> str:
    """A pipeline's result: the scores of base model and stages side by side, and whether each difference may be luck."""
    lines = []
    for scores, differences, note in pipeline_rows(report):
        lines += [text_table(scores, "<" + ">" * (len(scores[0]) - 1)), ""]
        lines += [text_table(differences, "<>><"), f"  {note}", ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
