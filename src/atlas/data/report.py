"""The page on what a run is trained on: every row accounted for, lengths as histograms."""

from pathlib import Path
from typing import TYPE_CHECKING

from atlas.files import write_text, writing
from atlas.pages import render

if TYPE_CHECKING:
    from atlas.data.labeled import Labeled

REPORT = "data_report.html"


def write_report(labeled: "Labeled", folder: Path) -> Path:
    """Write `data_report.html` to `folder`: per source what became of its rows, with lengths as histograms. Raises `RunError`
    where it cannot be written."""
    path = folder / REPORT
    with writing(path):
        write_text(path, page(labeled))
    return path


def page(labeled: "Labeled") -> str:
    """The page as HTML."""
    return render(
        "data.html.jinja",
        ledgers=labeled.ledgers,
        eval_ledgers=labeled.eval_ledgers,
        fingerprint=labeled.fingerprint[:16],
        held_out=labeled.held_out.line() if labeled.held_out else "",
    )
