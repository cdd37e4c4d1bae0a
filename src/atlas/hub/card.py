"""The model card (README.md) of a finished run: `card.md.jinja`, filled from the run's manifest, audit and scores."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from atlas.auditing.pairs import lengths_of_pairs
from atlas.files import digest, read_object, write_json, write_text
from atlas.models.weights import weights_sha256
from atlas.scores import PublicRun, Stored, rows

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+|[\w-]+", re.ASCII)
_DATASETS = {"ifeval": "google/IFEval"}  # where a task's data are on the Hub, if not under the task's name
_SEAL = "<!-- made by atlas, "
MARKS = {  # a text that only atlas writes into these files, which stand beside an adapter
    "audit_summary.json": '"stream_sha256"',
    "data_report.html": "<title>atlas: the data</title>",
    "dpo_template_audit.html": "<title>atlas: what is trained</title>",
    "report.html": "<title>atlas: the run",
    "scores.json": '"adapter_sha256"',
    "sft_template_audit.html": "<title>atlas: what is trained</title>",
}
# What of the config stands in the card: nothing that could be a path.
_RECIPE = {
    "quantization": ("load_in_4bit",),
    "lora": ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"),
    "train": (
        "learning_rate",
        "lr_scheduler_type",
        "num_train_epochs",
        "max_steps",
        "max_length",
        "packing",
        "seed",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ),
}


def write_card(folder: Path, repo: str | None, *, new: bool = False) -> None:
    """Write README.md, and copy the scores of this adapter from the results folder into scores.json.

    A card that somebody has edited stays, unless `new`: then it belonged to another adapter. Without a manifest there is no card.
    """
    path = folder / "README.md"
    if not (folder / "manifest.json").is_file():
        return
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    runs = _renew_scores(folder, Path(manifest["config"]["output"]["results_dir"]))
    audit = read_object(folder / "audit_summary.json")
    if audit.get("stream_sha256") != manifest["data"]["fingerprint"]:  # of other data
        audit = {}
    if new or not path.is_file() or is_generated(path.read_text(encoding="utf-8")):
        write_text(path, _sealed(card(manifest, repo or f"namespace/{folder.name}", runs, audit)))


def _sealed(text: str) -> str:
    return f"{text}{_SEAL}{digest(text)[:16]}: atlas leaves an edited card alone -->\n"


def is_generated(text: str) -> bool:
    """Whether a README.md is still as atlas wrote it, or is the template that PEFT's `save_pretrained` writes."""
    return "[More Information Needed]" in text or text == _sealed(text.rpartition(_SEAL)[0])


def is_foreign(path: Path) -> bool:
    """Whether a file with one of the names in `MARKS` exists that atlas did not write."""
    try:
        return MARKS[path.name] not in path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    except OSError:  # a folder
        return True


class _Scores(Stored):
    """What a card needs of metrics.json or scores.json: no path, no command line."""

    version: Literal[1] = Field(default=1, alias="schema")
    runs: list[PublicRun]


def _renew_scores(folder: Path, results: Path) -> list[PublicRun]:
    """The stored runs of this adapter, from the results folder or else from the folder's own copy, which is then renewed, so that
    the folder is complete in itself. Scores of another adapter are removed; a file that atlas did not write stays."""
    own, weights = folder / "scores.json", weights_sha256(folder)
    runs = stored_runs(folder, results, weights)
    if not is_foreign(own):
        if runs:
            stored = [run.model_dump(mode="json", exclude_unset=True) for run in runs]
            write_json(own, {"schema": 1, "runs": stored})
        else:
            own.unlink(missing_ok=True)
    return runs


def stored_runs(folder: Path, results: Path, weights: str | None) -> list[PublicRun]:
    """The stored runs of the weights with this digest, from the results folder or else from the run's own folder."""
    return _runs_of(results / "metrics.json", weights) or _runs_of(folder / "scores.json", weights)


def _runs_of(path: Path, weights: str | None) -> list[PublicRun]:
    """The stored runs of one adapter or whole model; none if the file cannot be read."""
    try:
        stored = _Scores.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [run for run in stored.runs if weights and weights in (run.adapter_sha256, run.model_sha256)]


def card(manifest: dict[str, Any], repo: str, runs: list[PublicRun], audit: dict[str, Any]) -> str:
    """The card's text. `runs`: stored runs of this adapter; `audit`: the summary of its data's audit, or empty.

    A phase gives its own `method` in words, and as `recipe` further keys of `train:` to show.
    """
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    config, name, full = manifest["config"], repo.rpartition("/")[2], manifest["config"].get("lora", ()) is None
    local = set(manifest.get("local", ()))
    base, revision = config["model"]["name"], config["model"]["revision"]
    sources = _sources(manifest)
    earlier = list(_ancestors(manifest))
    scores = list(rows(runs))
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS.get(row.task, row.task),
            dataset_name=row.task,
            metric_type=row.metric,
            metric_value=round(row.score, 4),
        )
        for row in scores
        if row.interval
    ]

    for before in earlier:
        local |= set(before.get("local", ()))

    def on_hub(name: str) -> bool:
        return name not in local and _HUB_ID.fullmatch(name) is not None

    def code(value: Any) -> str:
        return Markup(f"<code>{_text(', '.join(map(str, value)) if isinstance(value, list) else value)}</code>")

    def place(name: str) -> str:
        return name if on_hub(name) else code(_last_part(name))

    data = ModelCardData(
        base_model=base if on_hub(base) else None,
        library_name="transformers" if full else "peft",
        pipeline_tag="text-generation",
        tags=["atlas", "full-fine-tuning" if full else "lora", config.get("phase", "sft"), "trl"],
        datasets=sorted(
            {s["name"] for one in (manifest, *earlier) for s in one["config"]["data"]["train"] if on_hub(s["name"])}
        )
        or None,
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    unpinned = "at a revision that was not pinned" if on_hub(base) else "local"
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Every value becomes plain text, unless it is marked as Markdown here.
        finalize=lambda value: value if isinstance(value, Markup) else _text(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template.filters |= {
        "code": code,
        "number": lambda count: f"{count:,}",
        "place": place,
        "python": lambda value: Markup(json.dumps(value)),
        "rounded": lambda loss: f"{loss:.4f}" if isinstance(loss, float) else loss,
    }
    return template.get_template("card.md.jinja").render(
        metadata=Markup(data.to_yaml()),
        name=name,
        repo=repo,
        base_name=base if on_hub(base) else f"path/to/{_last_part(base)}",
        base_link=Markup(f"[{_text(base)}](https://huggingface.co/{base})") if on_hub(base) else place(base),
        pinned=Markup(f"at revision {code(revision)}") if revision else unpinned,
        revision=revision,
        method=manifest.get("method", "supervised fine-tuning"),
        manifest=manifest,
        config=config,
        full=full,
        result=manifest["result"],
        cut=sum(source["cut"] for source in sources),
        what="pairs" if any("chosen_tokens" in source for source in sources) else "conversations",
        audit=audit,
        lengths=lengths_of_pairs(audit["pairs"]) if audit.get("pairs") else "",
        scores=scores,
        recipe=_recipe(manifest),
        parent=manifest.get("parent"),
        earlier=[{"method": one["method"], "result": one["result"], "recipe": _recipe(one)} for one in earlier],
        tables=[("", sources), *((one["method"], _sources(one)) for one in earlier)],
    )


def _ancestors(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The manifests of the phases before, the last one first, as far as they are known."""
    found = (manifest.get("parent") or {}).get("manifest")
    if found:
        yield found
        yield from _ancestors(found)


def _sources(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    none = {"rows": 0, "used": 0, "supervised_tokens": 0, "cut": 0}
    return [none | source for source in manifest["data"]["sources"]]


def _recipe(manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    """What of a phase's config the card shows; a phase may name further keys of `train:`."""
    config, shown = manifest["config"], _RECIPE | {"train": (*_RECIPE["train"], *manifest.get("recipe", ()))}
    return [(f"{part}.{k}", config[part][k]) for part, keys in shown.items() for k in keys if k in (config[part] or ())]


def _last_part(name: str) -> str:
    """A local path says nothing to others, and a good deal about its owner."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _text(value: Any) -> str:
    """One line of plain text: each character that Markdown or HTML would take as its own becomes an entity."""
    return re.sub(r"[^\w\s.,:;/%+=()@-]|(?<!\w)_|_(?!\w)", lambda m: f"&#{ord(m[0])};", " ".join(str(value).split()))
