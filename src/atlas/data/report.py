"""`atlas data`: what a config would train on, row by row accounted for, as text and as a page. No model is loaded."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.cli import command
from atlas.console import quiet_libraries, say
from atlas.errors import DONE, UserError
from atlas.files import RESULTS_DIR, can_write, write_text, writing
from atlas.pages import render

if TYPE_CHECKING:
    from atlas.data.labeled import Labeled

REPORT = "data_report.html"


@command("data")
def main(arguments: Namespace) -> int:
    from atlas.audit.gate import gate
    from atlas.config import load_config
    from atlas.data.prepare import prepare
    from atlas.models.tokenizer import load_tokenizer

    quiet_libraries()
    config = load_config(arguments.config, arguments.overrides).config
    can_write(Path(config.output.results_dir), *RESULTS_DIR)
    labeled = prepare(config, load_tokenizer(config))
    if config.data.streaming:
        if any(source.rows is None and not source.is_local for source in config.data.train):
            raise UserError("data.streaming: say with `rows` how much of each source `atlas data` is to read")
        for _ in labeled.dataset:  # the ledgers count what passes by
            pass
    say(labeled.table())
    print(f"report: {write_report(labeled, Path(config.output.results_dir))}")
    gate(config, labeled)
    return DONE


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


if __name__ == "__main__":
    raise SystemExit(main())
