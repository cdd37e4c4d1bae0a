"""The model card (README.md) of a finished run, made from its manifest and its scores; no word in it is typed by hand."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from atlas.audit.report import public
from atlas.files import write_json, write_text

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+|[\w-]+", re.ASCII)
_DATASETS = {"ifeval": "google/IFEval"}  # where a task's data are on the Hub, if not under the task's name
_OF_RUN = ("name", "adapter_sha256", "dtype", "quantization", "date", "tasks")
_OF_TASK = ("n", "metrics", "stop_rate", "mean_tokens")
_SEAL = "<!-- made by atlas, "
MARKS = {  # what the other files hold that are written beside an adapter, and no other tool's of that name
    "audit_summary.json": '"stream_sha256"',
    "data_report.html": "<title>atlas: the data</title>",
    "scores.json": '"adapter_sha256"',
    "sft_template_audit.html": "<title>atlas: what is trained</title>",
}
_RECIPE = {  # of the config: nothing that could be a path
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
    """Write README.md from manifest.json, and into scores.json and audit_summary.json what is known of this adapter elsewhere, so
    that the folder is complete by itself.

    A card that somebody has edited is left alone, unless `new` says that it belonged to another adapter. A folder without manifest
    gets none.
    """
    path = folder / "README.md"
    if not (folder / "manifest.json").is_file():
        return
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    results = Path(manifest["config"]["output"]["results_dir"])
    data = manifest["data"]["fingerprint"]
    scores = _collect(folder / "scores.json", results / "metrics.json", _scores_of, _sha256(folder))
    audit = _collect(folder / "audit_summary.json", results / "sft_template_audit.jsonl", _audit_of, data)
    if new or not path.is_file() or is_generated(path.read_text(encoding="utf-8")):
        text = card(manifest, repo or f"namespace/{folder.name}", scores["runs"] if scores else [], audit)
        write_text(path, _sealed(text))


def _sealed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}{_SEAL}{digest}: atlas leaves an edited card alone -->\n"


def is_generated(text: str) -> bool:
    """Whether a README.md is atlas', as it was written, or PEFT's template."""
    from_peft = "[More Information Needed]" in text  # its template, which `save_pretrained` writes
    return from_peft or text == _sealed(text.rpartition(_SEAL)[0])


def is_foreign(path: Path) -> bool:
    """Whether there is a file under one of the names in `MARKS` that is not atlas'."""
    try:
        return MARKS[path.name] not in path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    except OSError:  # a folder
        return True


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def _collect(own: Path, source: Path, pick: Callable[[str, str], Any], key: str) -> Any:
    """What `pick` finds for `key` in `source`, or in the folder's own copy of it; which is renewed, or removed where stale.
    A file of that name that is not atlas' stays as it is."""
    for path in (source, own):
        try:
            found = pick(path.read_text(encoding="utf-8"), key)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if found:
            if not is_foreign(own):
                write_json(own, found)
            return found
    if not is_foreign(own):
        own.unlink(missing_ok=True)
    return None


def _scores_of(text: str, adapter: str) -> Any:
    runs = [run for run in json.loads(text)["runs"] if run.get("adapter_sha256") == adapter]
    list(_metrics(runs))  # raises where they are not written as they should be
    # Without paths and command lines: this goes up.
    kept = [{key: run[key] for key in _OF_RUN if key in run} for run in runs]
    for run in kept:
        run["tasks"] = {t: {k: scores[k] for k in _OF_TASK if k in scores} for t, scores in run["tasks"].items()}
    return {"schema": 1, "runs": kept} if kept else None


def _metrics(runs: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, tuple[float, float] | None, int, str]]:
    """(task, metric, score, 95 % interval or None, number of prompts, precision of the base) of each figure."""
    for run in runs:
        precision = " on ".join(str(run[key]) for key in ("dtype", "quantization") if run.get(key))
        for task, scores in run["tasks"].items():
            n = int(scores["n"])
            for metric, value in scores["metrics"].items():
                low, high = value["interval"]
                yield task, metric, float(value["score"]), (float(low), float(high)), n, precision
            for key in ("stop_rate", "mean_tokens"):
                if scores.get(key) is not None:
                    yield task, key, float(scores[key]), None, n, precision


def _audit_of(text: str, fingerprint: str) -> Any:
    last = json.loads(text if text.startswith("{\n") else text.rstrip("\n").rpartition("\n")[2])
    summary = public(last.get("summary", last))
    _audit_part(summary)  # raises where it is not a summary
    return summary if summary["stream_sha256"] == fingerprint else None


def card(manifest: dict[str, Any], repo: str, runs: list[dict[str, Any]], audit: dict[str, Any] | None) -> str:
    """The card's text. `runs`: rows of results/metrics.json for this adapter; `audit`: the summary of its data's audit."""
    from huggingface_hub import EvalResult, ModelCardData

    config, result, name = manifest["config"], manifest["result"], repo.rpartition("/")[2]
    local = set(manifest.get("local", ()))
    base, revision = config["model"]["name"], config["model"]["revision"]
    on_hub = _on_hub(base, local)
    sources = manifest["data"]["sources"]
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS.get(task, task),
            dataset_name=task,
            metric_type=metric,
            metric_value=round(score, 4),
        )
        for task, metric, score, interval, _, _ in _metrics(runs)
        if interval
    ]
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["atlas", "lora", "sft", "trl"],
        datasets=sorted({s["name"] for s in config["data"]["train"] if _on_hub(s["name"], local)}) or None,
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    recipe = [(f"{name}.{k}", config[name][k]) for name, keys in _RECIPE.items() for k in keys if k in config[name]]
    four_bit = config["quantization"]["load_in_4bit"]
    all_tokens = not config["train"].get("assistant_only_loss", False)
    unpinned = "at a revision that was not pinned" if on_hub else "local"
    pinned = f"at revision {_code(revision)}" if revision else unpinned
    base_text = f"[{_text(base)}](https://huggingface.co/{base})" if on_hub else _code(_last_part(base))
    steps = f"{result['steps']:,} steps on {result['supervised_tokens']:,} supervised tokens"
    cut = sum(source.get("cut", 0) for source in sources)
    limits = {
        "It was tuned on the data above alone, not for safety: it repeats what they and its base model get wrong.": True,
        "No score of it is recorded: whether it is better than its base model is not known.": not evaluations,
        "It was trained on its base in 4 bits. On the unquantised one, as above, its outputs differ slightly.": four_bit,
        f"{cut:,} conversations were cut at `max_length`: longer ones it has not seen whole.": cut > 0,
        "Its loss fell on all tokens, prompts too, and no label was audited (`assistant_only_loss: false`).": all_tokens,
        "The licenses of the base model and of the data apply.": True,
    }
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_text(name)}\n",
        f"A LoRA adapter for {base_text} ({pinned}), made by supervised fine-tuning with atlas: {steps}.\n",
        "## Data\n",
        _table(
            ["source", "rows", "used", "supervised tokens"],
            (
                [
                    _text(s["name"]) if _on_hub(s["name"], local) else _code(_last_part(s["name"])),
                    *(f"{s.get(key, 0):,}" for key in ("rows", "used", "supervised_tokens")),
                ]
                for s in sources
            ),
        ),
        _audit_part(audit),
        _scores_part(runs),
        "## Use\n",
        _usage(base if on_hub else f"path/to/{_last_part(base)}", revision, repo),
        "## Recipe\n",
        _table(["setting", "value"], ([_code(key), _code(_plain(value))] for key, value in recipe)),
        "## Made with\n",
        _table(
            ["what", "value"],
            [
                ["hardware", _text(manifest["device"].get("hardware"))],
                ["versions", _text(", ".join(f"{k} {v}" for k, v in manifest["versions"].items()))],
                ["atlas commit", _code((manifest.get("git") or {}).get("commit", "unknown"))],
                ["config hash", _code(manifest["config_hash"])],
                ["data fingerprint", _code(manifest["data"]["fingerprint"][:16])],
                ["loss", " -> ".join(_text(_rounded(result[key])) for key in ("loss_first", "loss_last"))],
                ["date", _text(manifest["date"])],
            ],
        ),
        "## Limits\n",
        "".join(f"- {limit}\n" for limit, holds in limits.items() if holds),
    ]
    return "\n".join(part for part in parts if part)


def _audit_part(audit: dict[str, Any] | None) -> str:
    if not audit:
        return ""
    was = "were" if audit["audited"] else "were not"
    verdict = _text(f"{audit['verdict']}, {audit['verdict_text']}")
    return f"The labels of all {audit['rows']:,} rows {was} audited: {verdict}.\n"


def _scores_part(runs: list[dict[str, Any]]) -> str:
    rows = [
        [
            *(_text(task), _text(metric), f"{score:.4g}"),
            *(" to ".join(f"{end:.4g}" for end in pair or ()), str(n), _text(precision)),
        ]
        for task, metric, score, pair, n, precision in _metrics(runs)
    ]
    head = ["task", "metric", "score", "95 % interval", "n", "base in"]
    return f"## Scores\n\n{_table(head, rows)}" if rows else ""


def _usage(base: str, revision: str | None, repo: str) -> str:
    """Python that asks for one reply, as it stands. The folder's generation config is loaded by hand, since PEFT keeps the base
    model's, which on a base of Qwen2.5's kind ends a document, but no reply."""
    base_revision = f", revision={json.dumps(revision)}" if revision else ""
    return f"""REVISION is the commit that `atlas push` has printed (`main`: the newest).

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

adapter, revision = {json.dumps(repo)}, "REVISION"
base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{base_revision}, dtype="auto")
model = PeftModel.from_pretrained(base, adapter, revision=revision)
model.generation_config = GenerationConfig.from_pretrained(adapter, revision=revision)  # where a reply ends
tokenizer = AutoTokenizer.from_pretrained(adapter, revision=revision)

messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
reply = model.generate(**prompt.to(model.device), max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```
"""


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _on_hub(name: str, local: set[str]) -> bool:
    return name not in local and _HUB_ID.fullmatch(name) is not None


def _last_part(name: str) -> str:
    """A local path says nothing to others, and a good deal about its owner."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _rounded(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(value: Any) -> str:
    """One line of plain text: what Markdown or HTML would take for its own becomes an entity."""
    return re.sub(r"[^\w\s.,:;/%+=()@-]|(?<!\w)_|_(?!\w)", lambda m: f"&#{ord(m[0])};", " ".join(str(value).split()))


def _code(value: Any) -> str:
    return f"<code>{_text(value)}</code>"
