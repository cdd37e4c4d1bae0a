"""The stored scores of a run, and whether they are better than those of what it began with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.errors import UserError, first_line
from atlas.eval.compare import Comparison, comparison
from atlas.eval.store import read_metrics
from atlas.hub.card import stored_runs
from atlas.report.folder import Folder
from atlas.scores import PublicRun, Scores, score_table


@dataclass(frozen=True)
class Scored:
    """The scores of one run's weights."""

    runs: Sequence[PublicRun] = ()
    """As results/metrics.json has them, else the folder's own copy."""
    found: list[Comparison] = field(default_factory=list)
    """Each against its base model, and the adapter that it goes on from, where both were asked the same."""
    problem: str | None = None
    """Why there is no comparison, where there are scores."""


def scored(folder: Folder) -> Scored:
    """By the digest of the weights, so that scores of an earlier run in the same folder do not count."""
    weights = folder.manifest.get("adapter_sha256") or folder.manifest.get("model_sha256")
    if weights is None:
        return Scored()
    results = results_dir(folder)
    runs = stored_runs(folder.path, results, weights)
    try:
        there, base = read_metrics(results).runs, folder.config["model.name"]
        bases = [run.name for run in there if run.method == "base" and run.model == base]
        parent = (folder.manifest.get("parent") or {}).get("sha256")
        bases += [run.name for run in there if parent and run.adapter_sha256 == parent]
    except UserError as error:
        return Scored(runs, problem=str(error))
    found, problem = [], None if bases else "its base model has no scores there: atlas eval --base scores it"
    for run in runs:
        for name in bases:
            try:
                found += comparison(results, [name, run.name])
            except (UserError, ImportError) as error:
                problem = first_line(error)
    return Scored(runs, found, None if found else problem)


def side_by_side(folders: Sequence[Folder], all_scored: Sequence[Scored]) -> list[Comparison]:
    """The first run's scores against those of each other, where they can be compared."""
    found: list[Comparison] = []
    (first, a), *others = zip(folders, all_scored, strict=True)
    for folder, b in others:
        if a.runs and b.runs and results_dir(folder).absolute() == results_dir(first).absolute():
            with suppress(UserError, ImportError):
                found += comparison(results_dir(first), [a.runs[0].name, b.runs[0].name])
    return found


def results_dir(folder: Folder) -> Path:
    config: dict[str, Any] = folder.config
    return Path(config["output.results_dir"])


def pipeline_rows(report: Mapping[str, Any]) -> Iterator[tuple[list[list[str]], list[list[str]], str]]:
    """Of each task in what pipeline.json holds: the scores of base model and stages side by side, their differences (both with a
    head), and what has to be known with them."""
    for task, columns in report["scores"].items():
        scores = {name: Scores.model_validate_json(json.dumps(found)) for name, found in columns.items()}
        of_task = [each for each in report["comparisons"] if each["task"] == task]
        differences = [["", "difference (95 %)", "p", "verdict"]]
        for each in of_task:
            low, high = each["interval"]
            p = "<0.0001" if each["p"] < 0.0001 else f"{each['p']:.4f}"
            change = f"{100 * each['value']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            differences.append([f"{each['b']} against {each['a']}", change, p, each["verdict"]])
        metric, among = of_task[0]["metric"], of_task[0]["among"]
        note = f"points of {metric}, prompt by prompt; verdicts corrected for the {among} comparisons (Holm)"
        yield score_table(f"{task}, {next(iter(scores.values())).n:,} prompts", scores), differences, note
