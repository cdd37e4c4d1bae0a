"""`atlas eval`: score the base model, an adapter or a merged model with lm-eval, and keep every prompt's reply.

Each finished task is on the disk before the next begins: started again, a run goes on where it stopped.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.cli import command
from atlas.compat import versions
from atlas.config import Config, EvalTask, QuantizationConfig
from atlas.console import quiet_libraries
from atlas.errors import DONE, UserError, first_line
from atlas.eval.store import METRICS, claimed, name_problem, read_metrics, records_file, store, unlike
from atlas.files import digest, sha256
from atlas.hub_client import split_revision
from atlas.launch import command_line
from atlas.models.adapters import WEIGHTS, Adapter, find_adapter, is_no_folder

if TYPE_CHECKING:
    from atlas.eval.tasks import LoadedTask

# What makes two runs of one name the same: a row of another is never added to.
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
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from atlas.config import load_config

    for option in ("adapter", "merged", "name", "tasks"):
        if getattr(arguments, option) == "":  # a variable that a shell does not know
            raise UserError(f"--{option} is empty: give it a value, or leave it out")
    overrides = list(arguments.overrides)
    if arguments.tasks:
        overrides.append(f"eval.tasks=[{arguments.tasks}]")
    config = load_config(arguments.config, overrides).config
    tasks = config.eval.tasks
    if arguments.limit is not None:
        tasks = tuple(task.model_copy(update={"limit": arguments.limit}) for task in tasks)
    target = _target(arguments, config)
    row = evaluate(config, target, tasks=tasks, replace=arguments.replace)
    print(table(row))
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
    if arguments.adapter is None and not (Path(asked) / "adapter_config.json").is_file():
        raise UserError(f"output.dir: {asked} holds no adapter yet: train first, or give --adapter or --base")
    adapter = find_adapter(asked, of_adapter)
    if base == adapter.base:
        revision = revision or adapter.base_revision
    return Target(arguments.name or _last_part(asked), base, "sft", revision, adapter)


def _last_part(name: str) -> str:
    return Path(name).resolve().name  # also of `.`


def evaluate(
    config: Config, target: Target, *, tasks: Sequence[EvalTask] | None = None, replace: bool = False
) -> dict[str, Any]:
    """Score `target` on the tasks that are not yet done; returns its row of results/metrics.json.

    Raises `UserError`, before a model is loaded, for what is missing (data, extras, room), for a row of the same name that belongs
    to another model, adapter, template or precision, or has a task with other settings, and for a name that another process is
    scoring. With `replace` such results give way, and each task is scored anew.
    """
    from atlas.eval.tasks import load_task

    if problem := name_problem(target.name):
        raise UserError(f"--name: {target.name!r} cannot name results: a name {problem}")
    quiet_libraries()
    ready = [
        load_task(task, config.eval.data.get(task.name), config.eval.chat_template)
        for task in tasks or config.eval.tasks
    ]
    with claimed(Path(config.output.results_dir), target.name, sum(task.room for task in ready)):
        return _evaluate(config, target, ready, replace)


def _evaluate(config: Config, target: Target, ready: Sequence["LoadedTask"], replace: bool) -> dict[str, Any]:
    from atlas.device import Machine, choose_device

    results = Path(config.output.results_dir)
    plan = choose_device(config, Machine.from_torch())
    dtype = plan.dtype if config.eval.dtype == "auto" else config.eval.dtype
    revision = _revision(target)
    tokenizer = _tokenizer(config, target)
    row = _row(config, target, revision, str(dtype), plan.hardware, tokenizer)
    done = _done(results, row, ready, replace)
    left = []
    for task in ready:
        name, records = task.settings.name, records_file(results, target.name, task.settings.name)
        if not replace and name in done and records.is_file() and sha256(records) == done[name]["records_sha256"]:
            print(f"{target.name}: {name} is done already ({done[name]['n']} prompts)")
        else:
            left.append(task)
    row["tasks"] = done  # each is replaced when it is scored anew, so that nothing is lost on the way
    if not left:
        return row
    run = _runner(config, target, dtype, plan.device, tokenizer)
    if target.adapter is not None and sha256(target.adapter.folder / WEIGHTS) != row["adapter_sha256"]:
        raise UserError(f"{target.adapter.name} was written to while it was loaded: run the same command again")
    for task in left:
        name = task.settings.name
        print(f"{target.name}: {name}, {task.n} prompts", flush=True)
        result = run(task)
        store(results, row, name, task.settings_record() | result.as_json(), result.lines())
        if result.cut_prompts:
            print(f"  {result.cut_prompts} prompts were longer than the model's context and lost their beginning")
    return row


def _tokenizer(config: Config, target: Target) -> Any:
    """The tokenizer that training uses, so that the base model is asked in the same words; an adapter brings its own, and so does
    a model that is asked in plain text, where it may have no chat template at all."""
    from atlas.models.tokenizer import load_tokenizer, read_tokenizer

    if target.adapter is not None and (target.adapter.folder / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(str(target.adapter.folder))
        if config.eval.chat_template and not tokenizer.chat_template:
            raise UserError(f"{target.adapter.name}: its tokenizer has no chat template to ask in")
        return tokenizer
    model = config.model
    if target.method == "merged":
        own = {"tokenizer_name": None, "tokenizer_revision": None}
        model = model.model_copy(update={"name": target.model, "revision": target.model_revision} | own)
    if config.eval.chat_template:
        return load_tokenizer(config.model_copy(update={"model": model}))
    if model.tokenizer_name is not None:
        return read_tokenizer(model.tokenizer_name, model.tokenizer_revision)
    return read_tokenizer(model.name, model.revision)


def _quantization(config: Config, target: Target) -> QuantizationConfig | None:
    """Of the base while it is scored: the adapter's own, where it was trained in 4 bits, else the config's."""
    if not config.eval.load_in_4bit:
        return None
    trained = target.adapter.quantization if target.adapter is not None else None
    return trained if trained is not None and trained.load_in_4bit else config.quantization


def _runner(config: Config, target: Target, dtype: str, device: str, tokenizer: Any) -> Any:
    from atlas.eval.harness import run_task
    from atlas.models.load import load_model

    model, tokenizer = load_model(
        target.model,
        target.adapter,
        revision=target.model_revision,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        quantization=_quantization(config, target),
    )
    return lambda task: run_task(model, tokenizer, task, batch_size=config.eval.batch_size)


def _row(
    config: Config, target: Target, revision: str | None, dtype: str, hardware: str, tokenizer: Any
) -> dict[str, Any]:
    adapter, quantization = target.adapter, _quantization(config, target)
    return {
        "name": target.name,
        "method": target.method,
        "config_hash": adapter.manifest.get("config_hash") if adapter else None,
        "model": target.model,
        "model_revision": revision,
        "adapter": adapter.name if adapter else None,
        "adapter_revision": adapter.revision if adapter else None,
        "adapter_sha256": sha256(adapter.folder / WEIGHTS) if adapter else None,
        "template_sha256": digest(tokenizer.get_chat_template()) if config.eval.chat_template else None,
        "dtype": dtype,
        "quantization": quantization.name if quantization else None,
        "batch_size": config.eval.batch_size,
        "hardware": hardware,
        "versions": versions("lm_eval"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "tasks": {},
    }


def _revision(target: Target) -> str | None:
    """The commit of a Hub model, or the sha256 of a local one's weights. Raises `UserError` where there is no such model."""
    model, asked, folder = target.model, target.model_revision, Path(target.model)
    key = "--merged" if target.method == "merged" else "model.name"
    if not folder.exists():
        from transformers.utils import cached_file
        from transformers.utils.hub import extract_commit_hash

        try:
            commit: str | None = extract_commit_hash(cached_file(model, "config.json", revision=asked), None)
        except OSError as error:
            raise UserError(f"{key}: {model!r} cannot be found: {first_line(error)}") from None
        return commit or asked
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {model!r} holds no model: config.json is missing")
    weights = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return f"sha256:{digest(''.join(weights))[:16]}"


def _done(results: Path, row: dict[str, Any], ready: Sequence["LoadedTask"], replace: bool) -> dict[str, Any]:
    """The tasks that the row of this name has; with `replace` those of the same model only. Raises `UserError` for what would be
    lost without it: results of another model, or of a task of `ready` with other settings."""

    def refuse(what: str, different: dict[str, tuple[Any, Any]]) -> None:
        if different and not replace:
            listed = "; ".join(f"{key} {there} there, {here} now" for key, (there, here) in different.items())
            raise UserError(
                f"{results / METRICS} has results of {what} ({listed}): choose another --name, or --replace to discard them"
            )

    known = next((known for known in read_metrics(results)["runs"] if known["name"] == row["name"]), None)
    if known is None:
        return {}
    different = {key: (known.get(key), row[key]) for key in _IDENTITY if known.get(key) != row[key]}
    refuse(f"another {row['name']!r}", different)
    tasks: dict[str, Any] = {} if different else known["tasks"]
    for task in ready:
        name = task.settings.name
        if name in tasks:
            refuse(f"{name} with other settings under {row['name']!r}", unlike(tasks[name], task.settings_record()))
    return tasks


def table(row: dict[str, Any]) -> str:
    """A run's scores as text."""
    adapter = f" + {row['adapter']}" if row["adapter"] else ""
    quantised = f" on {row['quantization']}" if row["quantization"] else ""
    lines = [f"{row['name']}: {row['model']}{adapter}, {row['dtype']}{quantised}"]
    for name, task in row["tasks"].items():
        lines.append(f"  {name} (version {task['version']}, {task['num_fewshot']} examples), {task['n']:,} prompts")
        for metric, found in task["metrics"].items():
            low, high = found["interval"]
            lines.append(f"    {metric:<22}{found['score']:>7.1%}   95 % interval {low:.1%} to {high:.1%}")
        if task["stop_rate"] is not None:
            lines.append(
                f"    {'stops by itself':<22}{task['stop_rate']:>7.1%}   mean {task['mean_tokens']:.0f} tokens"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
