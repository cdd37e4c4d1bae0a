"""The record of the audit: JSON lines for programs, a page for people, a few coloured lines for the terminal."""

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, pairwise, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.audit.spans import IGNORED, KINDS, NOTES, where
from atlas.audit.tokens import token_bytes
from atlas.config.schema import TEXT
from atlas.console import one_line
from atlas.errors import UserError
from atlas.files import digest, write_text, writing
from atlas.models.template import PINNED_DATE, TemplateRefusedError
from atlas.pages import counted, render, short

if TYPE_CHECKING:
    from atlas.data.labeled import Labeled

AUDIT_FILE = "sft_template_audit.jsonl"
AUDIT_PAGE = "sft_template_audit.html"
# The verdict is a warning where a larger share of the rows lost a part of what is trained. The `max_length` that it then names
# keeps all other rows whole.
MOST_SHORTENED = 0.01
_COLOURS = {"clean": "good", "warning": "warn", "defect": "bad"}
_MARKED = {"leak", "missing", "straddle", "history", "stop", "foreign"}  # findings whose bytes the page marks
_DIGESTS = 4096  # rows, or blocks of rows, whose digests the summary holds, so that a difference can be placed


def write_audit(labeled: "Labeled", folder: Path) -> Path:
    """Write `sft_template_audit.jsonl` and `.html` to `folder` and print the short form; returns the first's path.

    One line per recorded row, failing ones first, then one with `summary` for all rows; see docs/audit.md for the fields.
    Raises `RunError` where a file cannot be written; an older file then stays as it is.
    """
    records, summary = list(_records(labeled)), summarize(labeled)
    path = folder / AUDIT_FILE
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (*records, {"summary": summary})]
    for file, content in ((path, "".join(lines)), (folder / AUDIT_PAGE, page(records, summary))):
        with writing(file):
            write_text(file, content)
    show(records, summary)
    print(f"audit: {path}, to look at: {folder / AUDIT_PAGE}")
    return path


def write_page(labeled: "Labeled", folder: Path) -> None:
    """Write only `sft_template_audit.html` to `folder`. It quotes rows of the data, so it is never pushed."""
    write_text(folder / AUDIT_PAGE, page(list(_records(labeled)), summarize(labeled)))


def _records(labeled: "Labeled") -> Iterator[dict[str, Any]]:
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
            "trained_text": _trained_text(pieces, mask),
        }


def _role_spans(labeled: "Labeled", messages: list[dict[str, Any]], tools: list[Any] | None) -> list[dict[str, Any]]:
    """Bytes of the text that each message adds to the rendering of the messages before it."""
    labeler = labeled.labeler
    normalize = labeler.oracle.normalize if labeler.oracle else str
    try:
        texts = [labeler.renderer.text(messages[: end + 1], tools) for end in range(len(messages))]
    except (
        TemplateRefusedError
    ):  # a template that refuses the beginning of a conversation, a lone system turn for example
        return []
    ends = [0, *(len(normalize(text).encode()) for text in texts)]
    return [{"role": m["role"], "start": s, "end": e} for m, (s, e) in zip(messages, pairwise(ends), strict=True)]


def _trained_text(pieces: list[bytes], mask: list[int]) -> str:
    """The trained bytes as text, with `…` for each stretch of context between two trained stretches."""
    stretches = [
        b"".join(piece for piece, _ in group)
        for trained, group in groupby(zip(pieces, mask, strict=True), itemgetter(1))
        if trained
    ]
    return "…".join(stretch.decode(errors="replace") for stretch in stretches)


def summarize(labeled: "Labeled") -> dict[str, Any]:
    """One object about all rows: verdict, counts per finding, share of trained tokens, lengths, what `max_length` took, hashes.

    For a stream that has not been read yet it is about the first rows.
    """
    tokenizer = labeled.labeler.tokenizer
    ledgers = labeled.known
    findings = Counter(dict.fromkeys(KINDS, 0))
    for ledger in (*ledgers, *labeled.eval_ledgers):
        findings.update(ledger.findings)
        findings["injected"] += ledger.dropped.get("injected", 0)
    findings["stop"] += len(labeled.tokenizer_findings)

    def total(name: str) -> int:
        return sum(getattr(ledger, name) for ledger in ledgers)

    tokens, supervised = total("tokens"), total("supervised_tokens")
    digests = labeled.digests.astype("<i8")
    block = -(-total("used") // _DIGESTS)  # rows for each digest
    blocks = [digests[at : at + block] for at in range(0, len(digests), max(block, 1))]
    summary: dict[str, Any] = {
        "rows": total("used"),
        "documents": sum(ledger.used for ledger in ledgers if ledger.format == TEXT),
        "only_first_rows": not labeled.is_read,
        "audited": labeled.audited,
        "mask": labeled.mask,
        "findings": dict(findings),
        "tokenizer_findings": [finding.text for finding in labeled.tokenizer_findings],
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / max(tokens, 1), 4),
        "lengths": labeled.lengths,
        "max_length": labeled.labeler.max_length,
        "rows_cut": total("cut"),
        "rows_shortened": total("shortened"),
        "supervised_tokens_cut": total("lost_supervised_tokens"),
        "answers_without_stop": total("cut_stops"),
        "answers_lost": total("cut_answers"),
        "sources": [asdict(ledger) for ledger in ledgers],
        "stop_token": labeled.labeler.oracle.stop if labeled.labeler.oracle else None,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "date": str(PINNED_DATE) if labeled.labeler.renderer.is_dated else None,
        "template_sha256": digest(tokenizer.get_chat_template()),
        "stream_sha256": labeled.fingerprint,
        "digest_rows": block,
        "digests": "".join(hashlib.sha256(some.tobytes()).hexdigest()[:8] for some in blocks),
    }
    verdict, text = _verdict(summary)
    return {"verdict": verdict, "verdict_text": text} | summary


def _verdict(summary: dict[str, Any]) -> tuple[str, str]:
    """clean, warning or defect, and why."""
    defects: list[str] = []
    warnings: list[str] = []
    notes: list[str] = []
    for kind, count in summary["findings"].items():
        if count and kind != "injected":  # those rows are dropped
            said = f"stop ({count:,})" if kind == "stop" else f"{kind} in {counted(count, 'row')}"
            (notes if kind in NOTES else defects).append(said)
    if summary["mask"] == "all tokens":
        warnings.append(
            "the loss falls on all tokens, prompts too (train.assistant_only_loss=false), and no label is audited"
        )
    elif not summary["audited"]:
        warnings.append("nothing is audited (audit.gate=off)")
    if summary["rows_shortened"] > MOST_SHORTENED * summary["rows"]:
        enough = summary["lengths"]["p99"]
        warnings.append(
            f"{summary['rows_shortened']:,} of {summary['rows']:,} rows lost a part of what is trained at "
            f"train.max_length={summary['max_length']}; train.max_length={enough} would keep 99 % of the rows whole"
        )
    if defects or warnings:
        return ("defect" if defects else "warning"), "; ".join([*defects, *warnings, *notes])
    places = ["exactly what the model must generate"] if summary["documents"] < summary["rows"] else []
    places += ["every token of plain text"] if summary["documents"] else []
    return "clean", "; ".join([f"the loss falls on {', and on '.join(places)}", *notes])


def public(summary: dict[str, Any]) -> dict[str, Any]:
    """What of the summary may leave the machine: nothing that quotes or identifies a row."""
    return {name: value for name, value in summary.items() if name not in ("sources", "digests")}


def for_manifest(labeled: "Labeled") -> dict[str, Any]:
    """The summary's core: verdict, counts per finding, where the labels come from, how many rows were audited."""
    summary = summarize(labeled)
    kept = ("verdict", "verdict_text", "mask", "findings", "rows_cut", "rows_shortened", "date")
    rows = summary["rows"] - summary["documents"] if summary["audited"] else 0
    return {name: summary[name] for name in kept} | {"rows": rows}


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (name, value) lines, for terminal and page."""
    dropped: Counter[str] = Counter()
    for source in summary["sources"]:
        dropped.update(source["dropped"])
    rows = f"{summary['rows']:,}" + (" (the first; more are streamed)" if summary["only_first_rows"] else "")
    labels = {"markers": "the template's markers", "rendered": "rendering each turn"}.get(summary["mask"], "")
    if summary["documents"] == summary["rows"] or summary["mask"] == "all tokens":
        labels = "all tokens"
    elif summary["documents"]:
        labels += f"; {counted(summary['documents'], 'row')} of plain text: all tokens"
    cut = "none"
    if summary["rows_cut"]:
        lost = (
            ("supervised_tokens_cut", "trained token"),
            ("answers_without_stop", "stop token"),
            ("answers_lost", "whole answer"),
        )
        cut = f"{counted(summary['rows_cut'], 'row')} cut at {summary['max_length']}; lost: "
        cut += ", ".join(counted(summary[name], what) for name, what in lost)
    dated = [("date", f"{summary['date']}, pinned: the template asks for today's")] if summary["date"] else []
    return [
        ("rows", rows + "".join(f", {count:,} dropped ({reason})" for reason, count in dropped.items())),
        ("labels from", labels),
        (
            "trained",
            f"{summary['supervised_tokens']:,} of {summary['tokens']:,} tokens ({summary['supervised_share']:.1%})",
        ),
        ("tokens in a row", ", ".join(f"{name} {value:,}" for name, value in summary["lengths"].items())),
        ("truncation", cut),
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
        text = Text(one_line(f"  {short(records[0]['place'])}: "))
        for piece, trained in list(zip(records[0]["bytes"], records[0]["mask"], strict=True))[:120]:
            shown = one_line(bytes.fromhex(piece).decode(errors="replace"))
            text.append(shown, style="green" if trained else "dim")
        console.print(text.append("…" if len(records[0]["mask"]) > 120 else ""))


def page(records: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The page as HTML: verdict, facts, legend, and each recorded row with its trained tokens in colour."""
    return render(
        "audit.html.jinja",
        **{name: summary[name] for name in ("verdict", "verdict_text", "tokenizer_findings")},
        colours=_COLOURS,
        facts=facts(summary),
        kinds=KINDS,
        rows=[_shown(record) for record in records],
    )


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded row as the page shows it."""
    findings = record["findings"] or []
    cut = record["length"] - len(record["ids"])
    tags = [("note" if kind in NOTES else "bad", kind) for kind in sorted({finding["kind"] for finding in findings})]
    if record["format"] == TEXT:
        tags = [("note", TEXT)]
    elif not findings and not cut:
        tags = [("note", "not audited") if record["findings"] is None else ("good", "clean")]
    if cut:
        tags.append(("warn", f"cut: {len(record['ids']):,} of {record['length']:,} tokens"))
    about = [f"row {record['row']}" if record["row"] is not None else "outside the data set, or streamed"]
    about += [", ".join(span["role"] for span in record["roles"])] if record["roles"] else []
    about += [f"{sum(record['mask'])} of {len(record['mask'])} tokens trained"]
    return {
        "place": short(record["place"]),
        "tags": tags,
        "facts": "; ".join(about),
        "findings": [finding | {"where": where(finding)} for finding in findings],
        "tokens": list(_tokens(record)),
        "cut": cut,
    }


def _tokens(record: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Text, style classes and title of each token. Tokens that share a character show it at the last of them."""
    marked = [finding for finding in record["findings"] or [] if finding["kind"] in _MARKED]
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    at, left = 0, len(record["ids"])
    for token, name, hexed, trained in zip(*(record[key] for key in ("ids", "tokens", "bytes", "mask")), strict=True):
        piece, left = bytes.fromhex(hexed), left - 1
        text, end = decoder.decode(piece, final=not left), at + len(piece)
        classes = {
            "t": True,
            "s": trained,
            "f": any(finding["start"] < end and at < finding["end"] for finding in marked),
            "x": name.encode() == piece and name.startswith("<") and name.endswith(">"),  # a special token
            "part": not text,
        }
        title = f"id {token} · {piece.hex(' ')}"
        yield {"text": text, "title": title, "classes": " ".join(name for name, is_so in classes.items() if is_so)}
        at = end


def diff(first: Path, second: Path) -> tuple[bool, str]:
    """Do two audits have the same stream of ids and labels? (answer, what a person wants to know of it).

    Raises `UserError` where a file is no audit.
    """
    (rows_a, a), (rows_b, b) = _read(first), _read(second)
    hashes = a["stream_sha256"][:16], b["stream_sha256"][:16]
    if a["stream_sha256"] == b["stream_sha256"]:
        return True, f"the same {a['rows']:,} rows, token by token with the same mask (stream sha256 {hashes[0]})"
    lines = [f"different streams: {hashes[0]} and {hashes[1]}"]
    for name in ("rows", "mask", "max_length", "template_sha256", "eos_token"):
        if a[name] != b[name]:
            lines.append(f"  {name}: {a[name]} and {b[name]}")
    others = {row["row"]: row for row in rows_b if row["row"] is not None}
    pairs = [(row, others[row["row"]]) for row in rows_a if row["row"] in others]
    for row_a, row_b in sorted(pairs, key=lambda pair: pair[0]["row"]):
        if (row_a["ids"], row_a["mask"]) != (row_b["ids"], row_b["mask"]):
            return False, "\n".join([*lines, _first_difference(row_a, row_b)])
    size = a["digest_rows"]
    blocks = [[summary["digests"][at : at + 8] for at in range(0, len(summary["digests"]), 8)] for summary in (a, b)]
    differing = [number for number, (x, y) in enumerate(zip_longest(*blocks)) if x != y]
    if differing and size == b["digest_rows"]:
        last = (differing[0] + 1) * size - 1
        place = f"row {last}" if size == 1 else f"one of the rows {last - size + 1}-{last}"
        lines.append(f"  first difference: {place}, which these files do not record (audit.rows={last + 1} would)")
    return False, "\n".join(lines)


def _first_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    tokens = zip_longest(zip(a["ids"], a["mask"], strict=True), zip(b["ids"], b["mask"], strict=True))
    at = next(number for number, (token_a, token_b) in enumerate(tokens) if token_a != token_b)

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
        raise UserError(f"{path} is no template audit: {error or 'it has no summary line'}") from None
