"""The stored scores of a run, and whether they are better than those of what it began with."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.errors import UserError, first_line
from atlas.eval.compare import Comparison, comparison
from atlas.eval.store import read_metrics
from atlas.hub.card import stored_runs
from atlas.report.folder import Folder
from atlas.scores import PublicRun


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
