"""`atlas data`: what a config would train on, row by row accounted for, as text and as a page. No model is loaded."""

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.console import quiet_libraries, say
from atlas.errors import DONE, UserError, run_main
from atlas.files import RESULTS_DIR, can_write, write_text, writing

if TYPE_CHECKING:
    from atlas.data.ledger import SourceLedger
    from atlas.data.prepare import Labeled

REPORT = "data_report.html"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas data", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--config", required=True, help="phase YAML, as for `atlas sft`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted path into the config")
    arguments = parser.parse_intermixed_args(argv)
    return run_main(lambda: _main(arguments.config, arguments.overrides))


def _main(config_file: str, overrides: Sequence[str]) -> int:
    from atlas.audit.gate import gate
    from atlas.config import load_config
    from atlas.data.prepare import prepare
    from atlas.models.base import load_tokenizer

    quiet_libraries()
    config = load_config(config_file, overrides).config
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


_STYLE = """
table{border-collapse:collapse;margin:.8rem 0;width:100%}td,th{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left;
overflow-wrap:anywhere}th{color:var(--dim);font-weight:500}li{overflow-wrap:anywhere}
figure{margin:.6rem .9rem .6rem 0;display:inline-block;width:calc(50% - 1.2rem);min-width:17rem}
figcaption{color:var(--dim);font-size:.85rem}
svg{width:100%;height:auto;display:block}.bar{fill:var(--dim)}.bar.sup{fill:var(--sup)}
text{fill:var(--dim);font:11px system-ui,sans-serif}line{stroke:var(--line)}
@media(max-width:44rem){figure{width:100%;margin-right:0}.wide tr:first-child{display:none}
.wide tr{display:grid;grid-template-columns:1fr 1fr;gap:0 1rem;padding:.4rem 0;border-bottom:1px solid var(--line)}
.wide td{display:flex;justify-content:space-between;border:0;padding:.1rem 0}.wide td:first-child{grid-column:1/-1;font-weight:600}
.wide td+td::before{content:attr(data-name);color:var(--dim)}}
"""


def page(labeled: "Labeled") -> str:
    """A self-contained HTML page."""
    from atlas.audit.report import STYLE

    ledgers = labeled.ledgers
    share = labeled.supervised_tokens / max(labeled.tokens, 1)
    rows = sum(ledger.used for ledger in ledgers)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>atlas: the data</title><style>{STYLE}{_STYLE}</style><h1>What a run is trained on</h1>",
        f"<p><b>{rows:,}</b> rows, <b>{labeled.tokens:,}</b> tokens, of them <b>{labeled.supervised_tokens:,}</b> supervised "
        f"({share:.1%}). Fingerprint of ids and labels <code>{labeled.fingerprint[:16]}</code>.</p>",
        _overview((*ledgers, *labeled.eval_ledgers)),
    ]
    if labeled.held_out:
        parts.append(f"<p>{html.escape(labeled.held_out.line())}</p>")
    parts += [_source(ledger) for ledger in (*ledgers, *labeled.eval_ledgers)]
    return "\n".join(parts) + "\n"


def _overview(ledgers: Sequence["SourceLedger"]) -> str:
    names = ("source", "format", "rows read", "used", "again", "cut", "not used", "dropped", "tokens", "supervised")
    lines = ["<div class=wide><table><tr>" + "".join(f"<th>{name}" for name in names)]
    for ledger in ledgers:
        cells = [html.escape(_short(ledger.name)), ledger.format]
        aside, dropped = sum(ledger.set_aside.values()), sum(ledger.dropped.values())
        numbers = [ledger.rows, ledger.used, ledger.repeated, ledger.cut, aside, dropped]
        numbers += [ledger.tokens, ledger.supervised_tokens]
        cells += [f"{number:,}" for number in numbers]
        # On a phone each source is a block of its own, where every cell names its column.
        lines.append("<tr>" + "".join(f"<td data-name='{name}'>{c}" for name, c in zip(names, cells, strict=True)))
    return "".join(lines) + "</table></div>"


def _short(name: str) -> str:
    """A file by its last part; a Hub id whole."""
    return Path(name).name if Path(name).is_absolute() else name


def _source(ledger: "SourceLedger") -> str:
    parts = [f"<h2>{html.escape(ledger.name)}</h2>"]
    rows = []
    for title, lengths in (("tokens a row", ledger.lengths), ("supervised tokens a row", ledger.supervised_lengths)):
        if lengths:
            rows.append(f"<tr><td>{title}" + "".join(f"<td>{value:,}" for value in lengths.values()))
    if rows:
        heads = "".join(f"<th>{name}" for name in ledger.lengths)
        parts.append(f"<table><tr><th>{heads}{''.join(rows)}</table>")
    if ledger.histogram:
        edges = ledger.histogram["edges"]
        parts.append(_histogram("rows by tokens before truncation", edges, ledger.histogram["rows"], ""))
        parts.append(_histogram("rows by supervised tokens", edges, ledger.histogram["supervised"], "sup"))
    if ledger.cut:
        parts.append(
            f"<p>{ledger.cut:,} rows cut at max_length: {ledger.lost_supervised_tokens:,} supervised tokens lost; "
            f"{ledger.cut_stops:,} answers lost their stop token, {ledger.cut_answers:,} of them all they had.</p>"
        )
    reasons = [f"<li>not used, {html.escape(reason)}: {count:,}" for reason, count in sorted(ledger.set_aside.items())]
    for reason, count in sorted(ledger.dropped.items()):
        examples = "".join(
            f"<li>{html.escape(place)}: <code>{html.escape(detail)}</code>"
            for place, detail in ledger.examples.get(reason, [])
        )
        reasons.append(f"<li>dropped, {html.escape(reason)}: {count:,}<ul>{examples}</ul>")
    for kind, count in sorted(ledger.findings.items()):
        reasons.append(f"<li><b>audit: {html.escape(kind)}</b>: {count:,} rows")
    return "".join([*parts, f"<ul>{''.join(reasons)}</ul>" if reasons else ""])


def _histogram(title: str, edges: Sequence[int], counts: Sequence[int], kind: str) -> str:
    """Bars of `counts` between `edges`; the last one holds all beyond the last edge."""
    width, height, top = 400, 110, max(*counts, 1)
    step = width / len(counts)
    bars = [
        f"<rect class='bar {kind}' x='{at * step:.1f}' y='{height - count / top * height:.1f}' width='{step * 0.85:.1f}' "
        f"height='{count / top * height:.1f}'><title>{low:,}"
        f"{f'-{high - 1:,}' if high else ' and more'}: {count:,} rows</title></rect>"
        for at, (low, high, count) in enumerate(zip(edges, [*edges[1:], None], counts, strict=True))
    ]
    return (
        f"<figure><figcaption>{title}; highest bar {top:,} rows</figcaption>"
        f"<svg viewBox='0 0 {width} {height + 16}' role=img aria-label='{title}'><line x1=0 x2={width} y1={height} y2={height} />"
        f"{''.join(bars)}<text x=0 y={height + 13}>0</text>"
        f"<text x={width / 2} y={height + 13} text-anchor=middle>{edges[len(edges) // 2]:,}</text>"
        f"<text x={width} y={height + 13} text-anchor=end>{edges[-1]:,} and more</text></svg></figure>"
    )


if __name__ == "__main__":
    sys.exit(main())
