"""`atlas eval`: score the base model, an adapter or a merged model with lm-eval, and keep every prompt's reply.

Each finished task is on the disk before the next begins, so that a run that was stopped continues where it stopped.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from atlas.cli import command, run_command
from atlas.compat import versions
from atlas.config import Config, QuantizationConfig, load_config
from atlas.config.schema import TaskName
from atlas.device import Machine, choose_device
from atlas.errors import DONE, UserError, first_line
from atlas.eval.harness import run_task
from atlas.eval.store import METRICS, claimed, read_metrics, records_file, store
from atlas.eval.tasks import LoadedTask, load_task
from atlas.files import digest, read_object, sha256
from atlas.hub_client import split_revision
from atlas.launch import command_line, set_up_torch
from atlas.models.adapters import Adapter, find_adapter, is_no_folder, refuse_unloadable_model
from atlas.models.load import load_model
from atlas.models.tokenizer import load_tokenizer, read_tokenizer
from atlas.models.weights import holds_model, weights_sha256
from atlas.scores import Run, Task, name_problem, score_table, text_table
from atlas.terminal import quiet_libraries

# Two runs of one name are the same run where all of these agree; only then a task is added to a row.
_IDENTITY = (
    *("model", "model_revision", "adapter", "adapter_revision", "adapter_sha256", "config_hash", "template_sha256"),
    *("dtype", "quantization"),
)


@dataclass(frozen=True)
class Target:
    """What is scored. `model` is a Hub id or a folder; `name` is how the results call it."""

    name: str
    model: str
    method: str
    model_revision: str | None = None
    adapter: Adapter | None = None


@command("eval")
def main(arguments: Namespace) -> int:
    set_up_torch()
    for option in ("adapter", "merged", "name", "tasks"):
        if getattr(arguments, option) == "":  # a shell variable that is not set
            raise UserError(f"--{option} is empty: give it a value, or leave it out")
    overrides = list(arguments.overrides)
    if arguments.tasks:
        overrides.append(f"eval.tasks=[{arguments.tasks}]")
    config = load_config(arguments.config, overrides).config
    if arguments.limit is not None:
        limited = tuple(task.model_copy(update={"limit": arguments.limit}) for task in config.eval.tasks)
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": limited})})
    run = evaluate(config, _target(arguments, config), replace=arguments.replace)
    print("\n" + table(run))
    folder = Path(arguments.adapter or config.output.dir)
    if (folder / "report.html").is_file():  # of the run that was scored, or whose base model was
        run_command("report", [str(folder)])
    return DONE


def _target(arguments: Namespace, config: Config) -> Target:
    base, revision = config.model.name, config.model.revision
    if arguments.base:
        asked = "base" if config.eval.chat_template else "base-plain"
        return Target(arguments.name or f"{_last_part(base)}-{asked}", base, "base", revision)
    if arguments.merged:
        merged, of_merged = split_revision(arguments.merged)
        if is_no_folder(merged):
            raise UserError(f"--merged: there is no folder {merged!r} with a model")
        return Target(arguments.name or _last_part(merged), merged, "merged", of_merged)
    asked, of_adapter = split_revision(arguments.adapter or config.output.dir)
    if arguments.adapter is None and holds_model(Path(asked)):
        return finished(arguments.name or _last_part(asked), config, Path(asked))
    if arguments.adapter is None and not (Path(asked) / "adapter_config.json").is_file():
        raise UserError(f"output.dir: {asked} holds no finished run yet: train first, or give --adapter or --base")
    adapter = find_adapter(asked, of_adapter)
    if base == adapter.base:
        revision = revision or adapter.base_revision
    return Target(arguments.name or _last_part(asked), base, "sft", revision, adapter)


def finished(name: str, config: Config, folder: Path) -> Target:
    """What a run of the config has left in `folder`: a whole model, or an adapter for the config's base. Raises `UserError` where
    it is damaged."""
    if holds_model(folder):
        refuse_unloadable_model(folder)
        return Target(name, str(folder), "sft")
    return Target(name, config.model.name, "sft", adapter=find_adapter(str(folder)))


def _last_part(name: str) -> str:
    return Path(name).resolve().name  # also of `.`


def evaluate(config: Config, target: Target, *, replace: bool = False) -> Run:
    """Score `target` on the tasks of the config that are not yet done; returns its row of results/metrics.json.

    Raises `UserError`, before a model is loaded, for what is missing (data, packages, room on the disk), for a row of the same name
    that belongs to another model, adapter, template or precision, or has a task with other settings, and for a name that another
    process is scoring. With `replace` such results are discarded, and each task is scored again.
    """
    if problem := name_problem(target.name):
        raise UserError(f"--name: {target.name!r} cannot name results: a name {problem}")
    if not config.eval.tasks:
        raise UserError(f"eval.tasks is empty: name at least one of {', '.join(get_args(TaskName))}")
    quiet_libraries()
    asked = config.eval
    ready = [load_task(task, asked.data.get(task.name), asked.chat_template) for task in asked.tasks]
    with claimed(Path(config.output.results_dir), target.name, sum(task.room for task in ready)):
        return _evaluate(config, target, ready, replace)


def _evaluate(config: Config, target: Target, ready: Sequence[LoadedTask], replace: bool) -> Run:
    results, adapter = Path(config.output.results_dir), target.adapter
    plan = choose_device(config, Machine.from_torch())
    dtype = str(plan.dtype if config.eval.dtype == "auto" else config.eval.dtype)
    key = "--merged" if target.method == "merged" else "model.name"
    revision = revision_of(target.model, target.model_revision, key)
    tokenizer, quantization = _tokenizer(config, target), _quantization(config, target)
    template = tokenizer.get_chat_template() if config.eval.chat_template else None
    run = Run(
        name=target.name,
        method=target.method,
        config_hash=adapter.manifest.get("config_hash") if adapter else _manifest(target).get("config_hash"),
        model=target.model,
        model_revision=revision,
        adapter=adapter.name if adapter else None,
        adapter_revision=adapter.revision if adapter else None,
        adapter_sha256=weights_sha256(adapter.folder) if adapter else None,
        model_sha256=weights_sha256(Path(target.model)) if _manifest(target) else None,
        template_sha256=digest(template) if template else None,
        dtype=dtype,
        quantization=quantization.name if quantization else None,
        batch_size=config.eval.batch_size,
        hardware=plan.hardware,
        versions=versions("lm_eval"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        tasks={},
    )
    run.tasks = _done(
        results, run, ready, replace
    )  # each one is replaced after it was scored again, so nothing is lost before
    left = list(ready)
    for task in () if replace else ready:
        known, records = run.tasks.get(task.name), records_file(results, run.name, task.name)
        if known and records.is_file() and sha256(records) == known.records_sha256:
            print(f"{run.name}: {task.name} is done already ({known.n} prompts)")
            left.remove(task)
    if not left:
        return run
    model, tokenizer = load_model(
        target.model,
        adapter,
        revision=target.model_revision,
        tokenizer=tokenizer,
        dtype=dtype,
        device=plan.device,
        quantization=quantization,
    )
    written = weights_sha256(adapter.folder if adapter else Path(target.model)) if adapter or run.model_sha256 else None
    if written != (run.adapter_sha256 or run.model_sha256):
        where = adapter.name if adapter else target.model
        raise UserError(f"{where} was written to while it was loaded: run the same command again")
    for task in left:
        print(f"{run.name}: {task.name}, {task.settings.n} prompts", flush=True)
        scored, asked = run_task(model, tokenizer, task, batch_size=config.eval.batch_size)
        store(results, run, task.name, scored, asked)
        if scored.cut_prompts:
            print(f"  {scored.cut_prompts} prompts were longer than the model's context and lost their beginning")
    return run


def _tokenizer(config: Config, target: Target) -> Any:
    """An adapter brings its own tokenizer, and so does a whole model. A base model gets the one that training uses, so that it is
    asked in the same words; in plain text, its own, since it may have no chat template."""
    if target.adapter is not None and (target.adapter.folder / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(str(target.adapter.folder))
        if config.eval.chat_template and not tokenizer.chat_template:
            raise UserError(f"{target.adapter.name}: its tokenizer has no chat template to ask in")
        return tokenizer
    model = config.model
    if target.adapter is None and target.method != "base":
        own = {"tokenizer_name": None, "tokenizer_revision": None}
        model = model.model_copy(update={"name": target.model, "revision": target.model_revision} | own)
    if config.eval.chat_template:
        return load_tokenizer(config.model_copy(update={"model": model}))
    if model.tokenizer_name is not None:
        return read_tokenizer(model.tokenizer_name, model.tokenizer_revision)
    return read_tokenizer(model.name, model.revision)


def _manifest(target: Target) -> dict[str, Any]:
    """Of the run whose whole model is scored; empty for any other model."""
    folder = Path(target.model)
    return read_object(folder / "manifest.json") if target.adapter is None and holds_model(folder) else {}


def _quantization(config: Config, target: Target) -> QuantizationConfig | None:
    """Of the base while it is scored: the adapter's own, where it was trained in 4 bits, else the config's."""
    if not config.eval.load_in_4bit:
        return None
    trained = target.adapter.quantization if target.adapter is not None else None
    return trained if trained is not None and trained.load_in_4bit else config.quantization


def revision_of(model: str, asked: str | None, key: str) -> str | None:
    """The commit of a Hub model, or the sha256 of a local one's weights. Raises `UserError`, which begins with `key`, where there
    is no such model."""
    folder = Path(model)
    if not folder.exists():
        from transformers.utils import cached_file

        try:
            config = cached_file(model, "config.json", revision=asked)
        except OSError as error:
            raise UserError(f"{key}: {model!r} cannot be found: {first_line(error)}") from None
        return Path(config).parent.name if config else asked  # the Hub's cache has a folder for each commit
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {model!r} holds no model: config.json is missing")
    hashes = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return f"sha256:{digest(''.join(hashes))[:16]}"


def _done(results: Path, run: Run, ready: Sequence[LoadedTask], replace: bool) -> dict[str, Task]:
    """The tasks that the row of this name has; with `replace` those of the same model only. Raises `UserError` for what would be
    lost without it: results of another model, or of a task of `ready` with other settings."""

    def refuse(what: str, different: dict[str, tuple[Any, Any]]) -> None:
        if different and not replace:
            listed = "; ".join(f"{key} {there} there, {here} now" for key, (there, here) in different.items())
            raise UserError(
                f"{results / METRICS} has results of {what} ({listed}): choose another --name, or --replace to discard them"
            )

    known = next((known for known in read_metrics(results).runs if known.name == run.name), None)
    if known is None:
        return {}
    pairs = {key: (getattr(known, key), getattr(run, key)) for key in _IDENTITY}
    different = {key: (there, here) for key, (there, here) in pairs.items() if there != here}
    refuse(f"another {run.name!r}", different)
    tasks = {} if different else known.tasks
    for task in ready:
        if task.name in tasks:
            other = tasks[task.name].differences(task.settings)
            refuse(f"{task.name} with other settings under {run.name!r}", other)
    return tasks


def table(run: Run) -> str:
    """A run's scores as text."""
    adapter = f" + {run.adapter}" if run.adapter else ""
    lines = [f"{run.name}: {run.model}{adapter}, {run.precision}"]
    for name, task in run.tasks.items():
        examples = f", {task.num_fewshot} examples" * bool(task.num_fewshot)
        title = f"{name}, {task.n:,} prompts, version {task.version}{examples}"
        lines.append(text_table(score_table(title, {"score (95 % interval)": task}), "<<"))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
