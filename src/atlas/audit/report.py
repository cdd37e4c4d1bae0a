"""The record of the audit: JSON lines for programs, a page for people, a few coloured lines for the terminal."""

import hashlib
import html
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atlas.audit.spans import IGNORED, KINDS, NOTES, where
from atlas.audit.tokens import token_bytes
from atlas.console import one_line
from atlas.data.formats import TEXT
from atlas.data.labeled import Labeled
from atlas.files import write_text, writing
from atlas.models.template import PINNED_DATE

AUDIT_FILE = "sft_template_audit.jsonl"
AUDIT_PAGE = "sft_template_audit.html"
# The share of rows that may lose a part of their answers before the verdict is a warning: what the `max_length` that is then named
# would still cut.
MOST_SHORTENED = 0.01
_COLOURS = {"clean": "good", "warning": "warn", "defect": "bad"}
_DIGESTS = 4096  # rows, or blocks of rows, whose digests the summary holds, so that a difference can be placed


def write_audit(labeled: Labeled, folder: Path) -> Path:
    """Write `sft_template_audit.jsonl` and `.html` to `folder` and print the short form; returns the first's path.

    One line per recorded row, failing ones first, then one with `summary` for all rows; see docs/audit.md for the fields.
    Raises `RunError` where they cannot be written; older ones then stay as they are.
    """
    records = list(_records(labeled))
    summary = summarize(labeled)
    path = folder / AUDIT_FILE
    lines = [*records, {"summary": summary}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    for file, content in ((path, text), (folder / AUDIT_PAGE, page(records, summary))):
        with writing(file):
            write_text(file, content)
    show(records, summary)
    print(f"audit: {path}, to look at: {folder / AUDIT_PAGE}")
    return path


def write_page(labeled: Labeled, folder: Path) -> None:
    """Write only `sft_template_audit.html` to `folder`. It holds rows of the data: it is no file to push."""
    write_text(folder / AUDIT_PAGE, page(list(_records(labeled)), summarize(labeled)))


def _records(labeled: Labeled) -> Iterator[dict[str, Any]]:
    tokenizer = labeled.labeler.tokenizer
    table = token_bytes(tokenizer)
    for place, given, format_name, number in labeled.shown:
        (row,) = labeled.labeler.label([given], format_name)
        trained = {"input_ids": row.ids, "labels": row.labels}
        if number is not None:
            trained = labeled.dataset[number]  # what the trainer gets, not what was just computed
        ids, mask = trained["input_ids"], [int(label != IGNORED) for label in trained["labels"]]
        pieces = [table[token] for token in ids]
        assert row.parsed is not None  # rows of the dataset are good rows
        yield {
            "row": number,
            "place": place,
            "format": format_name,
            "text": b"".join(pieces).decode(errors="replace"),
            "roles": _role_spans(labeled, row.parsed.messages, row.parsed.tools),
            "length": row.length,
            "ids": ids,
            "tokens": tokenizer.convert_ids_to_tokens(ids),
            "bytes": [piece.hex() for piece in pieces],
            "mask": mask,
            "oracle": row.audit.spans if row.audit else None,
            "findings": [finding.as_json() for finding in row.audit.findings] if row.audit else None,
            "trained_text": trained_text(pieces, mask),
        }


def _role_spans(labeled: Labeled, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[dict[str, Any]]:
    """Bytes of the text that each message adds to the rendering of those before it."""
    labeler = labeled.labeler
    try:
        texts = [labeler.renderer.text(messages[: end + 1], tools) for end in range(len(messages))]
    except (
        Exception
    ):  # a template that refuses the beginning of a conversation (a lone system turn, say) has no such spans
        return []
    normalize = labeler.oracle.normalize if labeler.oracle else str
    ends = [len(normalize(text).encode()) for text in texts]
    starts = [0, *ends][: len(ends)]  # plain text has no messages
    return [{"role": m["role"], "start": s, "end": e} for m, s, e in zip(messages, starts, ends, strict=True)]


def trained_text(pieces: list[bytes], mask: list[int]) -> str:
    """The supervised bytes as text, with `…` for each stretch of context between two supervised ones."""
    stretches: list[bytearray] = []
    previous = 0
    for piece, supervised in zip(pieces, mask, strict=True):
        if supervised:
            if not previous:
                stretches.append(bytearray())
            stretches[-1] += piece
        previous = supervised
    return "…".join(stretch.decode(errors="replace") for stretch in stretches)


def summarize(labeled: Labeled) -> dict[str, Any]:
    """One object about all rows: verdict, counts per finding, share of supervised tokens, lengths, what `max_length` took, hashes.

    Of a stream that has not been read yet: about its first rows.
    """
    tokenizer = labeled.labeler.tokenizer
    is_read = any(ledger.rows for ledger in labeled.ledgers)
    ledgers = labeled.ledgers if is_read else labeled.previews
    everywhere = (*ledgers, *labeled.eval_ledgers)
    findings = {kind: sum(ledger.findings.get(kind, 0) for ledger in everywhere) for kind in KINDS}
    findings["stop"] += len(labeled.tokenizer_findings)
    findings["injected"] += sum(ledger.dropped.get("injected", 0) for ledger in everywhere)
    rows = sum(ledger.used for ledger in ledgers)
    tokens, supervised = (sum(getattr(x, name) for x in ledgers) for name in ("tokens", "supervised_tokens"))
    block = -(-rows // _DIGESTS)
    digests = labeled.digests.astype("<i8")
    summary: dict[str, Any] = {
        "rows": rows,
        "documents": sum(ledger.used for ledger in ledgers if ledger.format == TEXT),
        "only_first_rows": not is_read,
        "audited": labeled.audited,
        "mask": labeled.mask,
        "findings": findings,
        "tokenizer_findings": [finding.text for finding in labeled.tokenizer_findings],
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / max(tokens, 1), 4),
        "lengths": labeled.lengths,
        "max_length": labeled.labeler.max_length,
        "rows_cut": sum(ledger.cut for ledger in ledgers),
        "rows_shortened": sum(ledger.shortened for ledger in ledgers),
        "supervised_tokens_cut": sum(ledger.lost_supervised_tokens for ledger in ledgers),
        "answers_without_stop": sum(ledger.cut_stops for ledger in ledgers),
        "answers_lost": sum(ledger.cut_answers for ledger in ledgers),
        "sources": [asdict(ledger) for ledger in ledgers],
        "stop_token": labeled.labeler.oracle.stop if labeled.labeler.oracle else None,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "date": str(PINNED_DATE) if labeled.labeler.renderer.is_dated else None,
        "template_sha256": hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest(),
        "stream_sha256": labeled.fingerprint,
        "digest_rows": block,
        "digests": "".join(
            hashlib.sha256(digests[at : at + block].tobytes()).hexdigest()[:8]
            for at in range(0, len(digests), max(block, 1))
        ),
    }
    state, text = _verdict(summary)
    return {"verdict": state, "verdict_text": text} | summary


def _verdict(summary: dict[str, Any]) -> tuple[str, str]:
    """clean, warning or defect, and why."""
    counts = {kind: count for kind, count in summary["findings"].items() if count and kind != "injected"}
    said = {
        kind: f"{kind} in {count:,} row{'s' * (count > 1)}" if kind != "stop" else f"stop ({count:,})"
        for kind, count in counts.items()
    }
    defects = [text for kind, text in said.items() if kind not in NOTES]
    notes = [text for kind, text in said.items() if kind in NOTES]
    warnings = []
    if summary["mask"] == "all tokens":
        warnings.append(
            "the loss falls on all tokens, prompts too (train.assistant_only_loss=false), so that nothing is audited"
        )
    elif not summary["audited"]:
        warnings.append("nothing is audited (audit.gate=off)")
    if summary["rows_shortened"] > MOST_SHORTENED * summary["rows"]:
        warnings.append(
            f"{summary['rows_shortened']:,} of {summary['rows']:,} rows lost a part of what is trained at train.max_length="
            f"{summary['max_length']}; train.max_length={summary['lengths']['p99']} would keep 99 % of the rows whole"
        )
    if defects or warnings:
        return ("defect" if defects else "warning"), "; ".join([*defects, *warnings, *notes])
    where = "every token of plain text" if summary["documents"] else ""
    if summary["documents"] < summary["rows"]:
        where = "exactly what the model must generate" + (f", and on {where}" if where else "")
    return "clean", "; ".join([f"the loss falls on {where}", *notes])


def public(summary: dict[str, Any]) -> dict[str, Any]:
    """What of the summary may leave the machine: nothing that quotes or identifies a row."""
    return {name: value for name, value in summary.items() if name not in ("sources", "digests")}


def for_manifest(labeled: Labeled) -> dict[str, Any]:
    """The summary's core: verdict, counts per finding, where the labels come from, how many rows were audited."""
    summary = summarize(labeled)
    kept = ("verdict", "verdict_text", "mask", "findings", "rows_cut", "rows_shortened", "date")
    rows = summary["rows"] - summary["documents"] if summary["audited"] else 0
    return {name: summary[name] for name in kept} | {"rows": rows}


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (name, value) lines, for terminal and page."""
    lengths = summary["lengths"]
    dropped: dict[str, int] = {}
    for source in summary["sources"]:
        for reason, count in source["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    lost = (
        f"{summary['rows_cut']:,} rows cut at {summary['max_length']}: {summary['supervised_tokens_cut']:,} supervised tokens, "
        f"{summary['answers_without_stop']:,} stop tokens, {summary['answers_lost']:,} whole answers lost"
    )
    rows = f"{summary['rows']:,}" + (" (the first; more are streamed)" if summary["only_first_rows"] else "")
    labels = {"markers": "the template's markers", "rendered": "rendering each turn"}.get(summary["mask"], "")
    if summary["documents"] == summary["rows"] or summary["mask"] == "all tokens":
        labels = "all tokens"
    elif summary["documents"]:
        labels += f"; {summary['documents']:,} rows of plain text: all tokens"
    dated = [("date", f"{summary['date']}, pinned: the template asks for today's")] if summary["date"] else []
    return [
        ("rows", rows + "".join(f", {count:,} dropped ({reason})" for reason, count in dropped.items())),
        ("labels from", labels),
        (
            "supervised",
            f"{summary['supervised_tokens']:,} of {summary['tokens']:,} tokens ({summary['supervised_share']:.1%})",
        ),
        ("tokens a row", ", ".join(f"{name} {value:,}" for name, value in lengths.items())),
        ("truncation", lost if summary["rows_cut"] else "none"),
        *dated,
        ("stop / eos / pad", f"{summary['stop_token']} / {summary['eos_token']} / {summary['pad_token']}"),
        ("template sha256", summary["template_sha256"][:16]),
        ("stream sha256", summary["stream_sha256"][:16]),
    ]


def line(summary: dict[str, Any]) -> str:
    """The verdict as a line of text."""
    return f"audit {summary['verdict']}: {summary['verdict_text']}"


def show(records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print the verdict, the facts and the beginning of the first row, trained text in green (colours on a terminal only)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    style = {"clean": "bold green", "warning": "bold yellow", "defect": "bold red"}[summary["verdict"]]
    console.print(Text(line(summary), style=style))
    for name, value in facts(summary):
        console.print(Text(f"  {name:<17}{one_line(value)}"))
    if records:
        text = Text(one_line(f"  {_place(records[0])}: "))
        for piece, trained in list(zip(records[0]["bytes"], records[0]["mask"], strict=True))[:120]:
            shown = one_line(bytes.fromhex(piece).decode(errors="replace"))
            text.append(shown, style="green" if trained else "dim")
        console.print(text.append("…" if len(records[0]["mask"]) > 120 else ""))


# Whitespace is made visible by CSS, so that the text of the page is the text of the row.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#667080;--line:#dfe3e8;--card:#f6f7f9;
--sup-bg:#cdeed6;--sup:#0b5a28;--warn-bg:#ffe7ad;--warn:#6b4400;--bad-bg:#ffd3d0;--bad:#9c1111;--sp:#8a93a0}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e7eb;--dim:#97a1ae;--line:#2c323a;--card:#1b1f25;
--sup-bg:#12452a;--sup:#a9ecc0;--warn-bg:#4d3800;--warn:#ffd98a;--bad-bg:#5c1a1a;--bad:#ffc2bc;--sp:#6d7784}}
*{box-sizing:border-box}body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.3rem;margin:.2rem 0}h2{font-size:1rem;margin:1.6rem 0 .4rem;overflow-wrap:anywhere}
.verdict{font-weight:600;padding:.5rem .8rem;border-radius:.4rem;margin:.6rem 0}
.good{background:var(--sup-bg);color:var(--sup)}.bad{background:var(--bad-bg);color:var(--bad)}
.warn{background:var(--warn-bg);color:var(--warn)}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.15rem 1rem;margin:.8rem 0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
.row{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem;
font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.t{color:var(--dim);border-radius:.15rem;cursor:default}.t:hover{outline:1px solid currentColor}
.s{background:var(--sup-bg);color:var(--sup)}.f{background:var(--bad-bg);color:var(--bad);text-decoration:underline wavy}
.x{font-weight:700}.w{position:relative}.w::before{position:absolute;left:0;color:var(--sp);pointer-events:none}
.sp::before{content:"·"}.nl::before{content:"↵"}.tb::before{content:"→"}
.nl{display:inline-block;width:1ch;height:1em}.b{font-size:.8em;font-style:normal}
.k::before{content:"▏";font-style:normal;opacity:.6}
.legend span{padding:.05rem .4rem;margin-right:.4rem;border-radius:.2rem;white-space:nowrap}
ul{padding-left:1.2rem;margin:.3rem 0}code{overflow-wrap:anywhere}small{color:var(--dim)}
"""


# The id and bytes of the token that is pointed at, tapped or has the focus stand in a line of their own: a phone has no mouse,
# and shows no titles.
_STYLE = """
body{padding-bottom:4rem}.t:focus{outline:2px solid currentColor}.t:hover::after,.t:focus::after{content:attr(title);position:fixed;
left:0;right:0;bottom:0;padding:.6rem 1rem;background:var(--fg);color:var(--bg);font:15px/1.4 ui-monospace,Menlo,monospace;
font-weight:400;text-decoration:none;white-space:normal;z-index:2}.t:hover::after{z-index:3}
.tag{font-size:.8rem;font-weight:600;padding:.1rem .5rem;margin-left:.3rem;border-radius:.8rem;white-space:nowrap}
.note{border:1px solid var(--line)}
.facts{margin:0 0 .3rem;color:var(--dim);font-size:.85rem}
@media(max-width:34rem){body{padding:.7rem .7rem 4rem}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}.row{padding:.5rem}}
"""


def page(records: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """A self-contained HTML page: summary, legend, and each recorded row with its trained tokens in colour."""
    verdict = f"{summary['verdict']}: {summary['verdict_text']}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>atlas: what is trained</title><style>{STYLE}{_STYLE}</style>",
        "<h1>What is trained</h1>",
        f"<p class='verdict {_COLOURS[summary['verdict']]}'>{html.escape(verdict)}</p>",
        "<dl>" + "".join(f"<dt>{html.escape(k)}<dd>{html.escape(v)}" for k, v in facts(summary)) + "</dl>",
    ]
    parts += [f"<p class='verdict bad'>stop: {html.escape(text)}</p>" for text in summary["tokenizer_findings"]]
    parts.append(
        "<p class=legend><span class='t s'>trained</span><span class=t>context</span><span class='t f'>finding</span>"
        "<small>· space, ↵ newline, → tab; <b>special tokens</b> are bold. Tap a token, point at it or go to it with the Tab "
        "key: its id and bytes stand at the foot of the page.</small></p>"
    )
    parts += [_row(record) for record in records]
    return "\n".join(parts) + "\n"


def _place(record: dict[str, Any]) -> str:
    """Where a row is from: a file by its last part, a Hub id whole."""
    place: str = record["place"]
    return place.rpartition("/")[2] if place.startswith("/") else place


def _state(record: dict[str, Any]) -> str:
    """A row's verdict: a word for each thing that is wrong."""
    kinds = sorted({finding["kind"] for finding in record["findings"] or []})
    words = [("note" if kind in NOTES else "bad", kind) for kind in kinds]
    if record["length"] > len(record["ids"]):
        words.append(("warn", f"cut: {len(record['ids']):,} of {record['length']:,} tokens"))
    if not words:
        words = [("good", "clean")] if record["findings"] is not None else [("note", "not audited")]
    if record["format"] == TEXT:
        words = [("note", TEXT), *(word for word in words if word[0] == "warn")]
    return "".join(f"<span class='tag {colour}'>{word}</span>" for colour, word in words)


def _row(record: dict[str, Any]) -> str:
    findings = record["findings"] or []
    described = "".join(
        f"<li><b>{html.escape(f['kind'])}</b> ({html.escape(KINDS[f['kind']])}): {where(f)}: "
        f"<code>{html.escape(repr(f['text']))}</code>"
        for f in findings
    )
    marked = [f for f in findings if f["kind"] in ("leak", "missing", "straddle", "history", "stop", "foreign")]
    tokens, at = [], 0
    pieces = [bytes.fromhex(hexed) for hexed in record["bytes"]]
    displays = _displays(pieces, record["mask"])
    for token, name, piece, trained, shown in zip(
        record["ids"], record["tokens"], pieces, record["mask"], displays, strict=True
    ):
        end = at + len(piece)
        bad = any(f["start"] < end and at < f["end"] for f in marked)
        special = name.encode() == piece and name.startswith("<") and name.endswith(">")
        classes = "t" + (" s" if trained else "") + (" f" if bad else "") + (" x" if special else "")
        tokens.append(f"<span class='{classes}' tabindex=0 title='id {token} &middot; {piece.hex(' ')}'>{shown}</span>")
        at = end
    roles = ", ".join(span["role"] for span in record["roles"])
    number = f"row {record['row']}" if record["row"] is not None else "outside the data set, or streamed"
    if (cut := record["length"] - len(record["ids"])) > 0:
        tokens.append(f"<span class='tag warn'>✂ {cut:,} tokens cut off</span>")
    facts = [number, roles, f"{sum(record['mask'])} of {len(record['mask'])} tokens trained"]
    return (
        f"<h2>{html.escape(_place(record))} {_state(record)}</h2><p class=facts>{html.escape('; '.join(filter(None, facts)))}</p>"
        f"{'<ul>' + described + '</ul>' if described else ''}<div class=row>{''.join(tokens)}</div>"
    )


def _displays(pieces: list[bytes], mask: list[int]) -> list[str]:
    """HTML for each token. Tokens that share a character show it at the first of them; a mark stands for the others."""
    displays: list[str] = []
    while len(displays) < len(pieces):
        first = len(displays)
        for end in range(first + 1, min(first + 5, len(pieces) + 1)):  # a character has at most four bytes
            if mask[end - 1] != mask[first]:
                break
            try:
                text = b"".join(pieces[first:end]).decode()
            except UnicodeDecodeError:
                continue
            displays += [_visible(text), *["<i class=k></i>"] * (end - first - 1)]
            break
        if len(displays) == first:  # no character: cut off, or one that is trained only in part
            displays.append(f"<i class=b>‹{pieces[first].hex()}›</i>")
    return displays


def _visible(text: str) -> str:
    shown = {
        " ": "<span class='w sp'> </span>",
        "\n": "<span class='w nl'></span>\n",
        "\t": "<span class='w tb'>\t</span>",
    }
    return "".join(shown.get(char) or html.escape(char) for char in text)


def diff(first: Path, second: Path) -> tuple[bool, str]:
    """Do two audits have the same stream of ids and labels? (answer, what a person wants to know of it).

    Raises `ValueError` where a file is no audit.
    """
    (rows_a, a), (rows_b, b) = _read(first), _read(second)
    if a["stream_sha256"] == b["stream_sha256"]:
        return (
            True,
            f"the same {a['rows']:,} rows, token by token with the same mask (stream sha256 {a['stream_sha256'][:16]})",
        )
    lines = [f"different streams: {a['stream_sha256'][:16]} and {b['stream_sha256'][:16]}"]
    if a["rows"] != b["rows"]:
        lines.append(f"  rows: {a['rows']:,} and {b['rows']:,}")
    for name in ("mask", "max_length", "template_sha256", "eos_token"):
        if a[name] != b[name]:
            lines.append(f"  {name}: {a[name]} and {b[name]}")
    numbered = [{row["row"]: row for row in rows if row["row"] is not None} for rows in (rows_a, rows_b)]
    for number in sorted(numbered[0].keys() & numbered[1].keys()):
        row_a, row_b = (rows[number] for rows in numbered)
        if (row_a["ids"], row_a["mask"]) != (row_b["ids"], row_b["mask"]):
            return False, "\n".join([*lines, _first_difference(row_a, row_b)])
    if a["digest_rows"] == b["digest_rows"]:
        blocks = [[s["digests"][i : i + 8] for i in range(0, len(s["digests"]), 8)] for s in (a, b)]
        block = next((i for i, (x, y) in enumerate(zip(*blocks, strict=False)) if x != y), min(map(len, blocks)))
        size = a["digest_rows"]
        where = f"row {block}" if size == 1 else f"one of the rows {block * size}-{(block + 1) * size - 1}"
        lines.append(
            f"  first difference: {where}, which these files do not record (audit.rows={block * size + size} would)"
        )
    return False, "\n".join(lines)


def _first_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    pairs_a, pairs_b = list(zip(a["ids"], a["mask"], strict=True)), list(zip(b["ids"], b["mask"], strict=True))
    at = next(
        (i for i, (x, y) in enumerate(zip(pairs_a, pairs_b, strict=False)) if x != y), min(len(pairs_a), len(pairs_b))
    )

    def token(row: dict[str, Any]) -> str:
        if at >= len(row["ids"]):
            return "the row ends"
        return f"{row['tokens'][at]!r} (id {row['ids'][at]}, {'trained' if row['mask'][at] else 'context'})"

    before = bytes.fromhex("".join(a["bytes"][max(0, at - 8) : at])).decode(errors="replace")
    return f"  first difference: row {a['row']}, token {at}, after {before!r}: {token(a)} and {token(b)}"


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        return [line for line in lines if "ids" in line], next(line["summary"] for line in lines if "summary" in line)
    except (OSError, ValueError, StopIteration, TypeError) as error:
        raise ValueError(f"{path} is no template audit: {error or 'it has no summary line'}") from None
