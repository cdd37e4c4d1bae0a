"""The record of the audit: JSON lines for programs, a page for people, a few coloured lines for the terminal."""

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby, pairwise, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.auditing.pairs import ALL_KINDS, lengths_of_pairs
from atlas.auditing.spans import IGNORED, NOTES, RowAudit, where
from atlas.auditing.tokens import token_bytes
from atlas.config.schema import TEXT
from atlas.console import one_line
from atlas.errors import UserError
from atlas.files import digest, write_text, writing
from atlas.models.template import PINNED_DATE, Renderer, TemplateRefusedError
from atlas.pages import counted, render, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas.data.labeled import Labeled
    from atlas.data.tokenize import LabeledRow

AUDIT_PAGES = "*_template_audit.html"
"""Of each phase, as a pattern."""
# The verdict is a warning where a larger share of the rows lost a part of what is trained. The `max_length` that it then names
# keeps all other rows whole.
MOST_SHORTENED = 0.01
_COLOURS = {"clean": "good", "warning": "warn", "defect": "bad"}
_MARKED = {"leak", "missing", "straddle", "history", "stop", "foreign"}  # findings whose bytes the page marks
_DIGESTS = 4096  # rows, or blocks of rows, whose digests the summary holds, so that a difference can be placed


def _file(labeled: "Labeled", folder: Path, ending: str) -> Path:
    return folder / f"{labeled.labeler.phase}_template_audit{ending}"


def write_audit(labeled: "Labeled", folder: Path) -> Path:
    """Write `sft_template_audit.jsonl` and `.html` (with the name of the phase) to `folder` and print the short form; returns the
    first's path.

    One line per recorded row, failing ones first, then one with `summary` for all rows; see docs/audit.md for the fields.
    Raises `RunError` where a file cannot be written; an older file then stays as it is.
    """
    records, summary = list(_records(labeled)), summarize(labeled)
    path, shown = (_file(labeled, folder, ending) for ending in (".jsonl", ".html"))
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (*records, {"summary": summary})]
    for file, content in ((path, "".join(lines)), (shown, page(records, summary))):
        with writing(file):
            write_text(file, content)
    show(records, summary)
    print(f"audit: {path}, to look at: {shown}")
    return path


def write_page(labeled: "Labeled", folder: Path) -> None:
    """Write only the page to `folder`. It quotes rows of the data, so it is never pushed."""
    write_text(_file(labeled, folder, ".html"), page(list(_records(labeled)), summarize(labeled)))


def _records(labeled: "Labeled") -> Iterator[dict[str, Any]]:
    labeler, table = labeled.labeler, token_bytes(labeled.labeler.tokenizer)
    for place, given, format_name, number in labeled.shown:
        (row,) = labeler.label([given], format_name)
        trained = dict(zip(labeler.columns, row.lists, strict=True))
        if number is not None:
            trained = labeled.dataset[number]  # what the trainer gets, not what was just computed
        of = labeler.trained(trained)
        sides = {name: _side(labeled, table, side, *of[name]) for name, side in row.sides.items()}
        yield {"row": number, "place": place, "format": format_name, **sides.pop("", sides)}


def _side(
    labeled: "Labeled", table: dict[int, bytes], row: "LabeledRow", ids: list[int], labels: list[int]
) -> dict[str, Any]:
    """The record of a row's conversation; a pair has two."""
    assert row.parsed is not None  # rows of the dataset are good rows
    labeler, messages, tools = labeled.labeler, row.parsed.messages, row.parsed.tools
    roles = role_spans(labeler.renderer, labeler.oracle.normalize if labeler.oracle else str, messages, tools)
    return record(labeler.tokenizer, table, ids, labels, roles, row.audit, row.length)


def record(
    tokenizer: "PreTrainedTokenizerBase",
    table: dict[int, bytes],
    ids: list[int],
    labels: list[int],
    roles: list[dict[str, Any]],
    audit: RowAudit | None,
    length: int,
) -> dict[str, Any]:
    """What is recorded of a conversation's tokens. `table`: of `token_bytes`; `length`: its tokens before truncation."""
    mask = [int(label != IGNORED) for label in labels]
    pieces = [table[token] for token in ids]
    return {
        "text": b"".join(pieces).decode(errors="replace"),
        "roles": roles,
        "length": length,
        "ids": ids,
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "bytes": [piece.hex() for piece in pieces],
        "mask": mask,
        "oracle": audit.spans if audit else None,
        "findings": [finding.as_json() for finding in audit.findings] if audit else None,
        "trained_text": _trained_text(pieces, mask),
    }


def _sides(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The conversations of a record, by name: one without a name, or the two of a pair."""
    return {"": record} if "ids" in record else {name: record[name] for name in ("chosen", "rejected")}


def role_spans(
    renderer: Renderer, normalize: Callable[[str], str], messages: list[dict[str, Any]], tools: list[Any] | None
) -> list[dict[str, Any]]:
    """Bytes of the text that each message adds to the rendering of the messages before it."""
    try:
        texts = [renderer.text(messages[: end + 1], tools) for end in range(len(messages))]
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
    findings = Counter(dict.fromkeys(labeled.labeler.kinds, 0))
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
        **labeled.labeler.ledger.summary(ledgers),
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
            said = f"stop ({count:,})" if kind == "stop" else f"{kind} in {counted(count, _noun(summary))}"
            (notes if kind in NOTES else defects).append(said)
    if summary["mask"] == "all tokens":
        warnings.append(
            "the loss falls on all tokens, prompts too (train.assistant_only_loss=false), and no label is audited"
        )
    elif not summary["audited"]:
        warnings.append("nothing is audited (audit.gate=off)")
    if long := _too_long(summary):
        warnings.append(long)
    elif summary["rows_shortened"] > MOST_SHORTENED * summary["rows"]:
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


def _noun(summary: dict[str, Any]) -> str:
    return "pair" if "pairs" in summary else "row"


def _too_long(summary: dict[str, Any]) -> str | None:
    """Of pairs: how many do not fit in `max_length`, where they are too many."""
    if "pairs" not in summary:
        return None
    cut, long, one_side = summary["rows_shortened"], *map(summary["pairs"].get, ("long_prompts", "one_side_cut"))
    some, total = cut + long + one_side, summary["rows"] + long + one_side
    if some <= MOST_SHORTENED * total:
        return None
    fates = [(cut, "lost the end of both answers"), (one_side, "would lose that of one answer, and are not used")]
    fates.append((long, "have no room for an answer, and are not used"))
    return (
        f"{some:,} of {total:,} pairs are longer than train.max_length={summary['max_length']} ("
        + ", ".join(f"{count:,} {fate}" for count, fate in fates if count)
        + f"); train.max_length={summary['pairs']['fits']} would keep 99 % of the pairs whole"
    )


def public(summary: dict[str, Any]) -> dict[str, Any]:
    """What of the summary may leave the machine: nothing that quotes or identifies a row."""
    return {name: value for name, value in summary.items() if name not in ("sources", "digests")}


def for_manifest(labeled: "Labeled") -> dict[str, Any]:
    """The summary's core: verdict, counts per finding, where the labels come from, how many rows were audited."""
    summary = summarize(labeled)
    kept = ("verdict", "verdict_text", "mask", "findings", "rows_cut", "rows_shortened", "date")
    rows = summary["rows"] - summary["documents"] if summary["audited"] else 0
    of_pairs = {"pairs": summary["pairs"]} if "pairs" in summary else {}
    return {name: summary[name] for name in kept} | {"rows": rows} | of_pairs


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (name, value) lines, for terminal and page."""
    noun, dropped = _noun(summary), Counter[str]()
    for source in summary["sources"]:
        dropped.update(source["dropped"])
    rows = f"{summary['rows']:,}" + (" (the first; more are streamed)" if summary["only_first_rows"] else "")
    labels = {
        "markers": "the template's markers",
        "rendered": f"rendering each {'answer' if noun == 'pair' else 'turn'}",
    }.get(summary["mask"], "")
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
        cut = f"{counted(summary['rows_cut'], noun)} cut at {summary['max_length']}; lost: "
        cut += ", ".join(counted(summary[name], what) for name, what in lost)
    more = [("answers", lengths_of_pairs(summary["pairs"]))] if "pairs" in summary else []
    dated = [("date", f"{summary['date']}, pinned: the template asks for today's")] if summary["date"] else []
    return [
        (f"{noun}s", rows + "".join(f", {count:,} dropped ({reason})" for reason, count in dropped.items())),
        ("labels from", labels),
        (
            "trained",
            f"{summary['supervised_tokens']:,} of {summary['tokens']:,} tokens ({summary['supervised_share']:.1%})",
        ),
        *more,
        (f"tokens in a {noun}", ", ".join(f"{name} {value:,}" for name, value in summary["lengths"].items())),
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
    for name, side in _sides(records[0]).items() if records else ():
        text = Text(one_line(f"  {name or short(records[0]['place'])}: "))
        start = max(0, side["mask"].index(1) - 40) if name and 1 in side["mask"] else 0  # of a pair, where it parts
        for piece, trained in list(zip(side["bytes"], side["mask"], strict=True))[start : start + 120]:
            shown = one_line(bytes.fromhex(piece).decode(errors="replace"))
            text.append(shown, style="green" if trained else "dim")
        console.print(text.append("…" if len(side["mask"]) > start + 120 else ""))


def page(records: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The page as HTML: verdict, facts, legend, and each recorded row with its trained tokens in colour."""
    said = {name: summary[name] for name in ("verdict", "verdict_text", "tokenizer_findings")}
    return page_of(records, facts(summary), has_pairs="pairs" in summary, **said)


def page_of(
    records: list[dict[str, Any]],
    facts: list[tuple[str, str]],
    verdict: str,
    verdict_text: str,
    tokenizer_findings: list[str],
    has_pairs: bool = False,
) -> str:
    """The page of any audit; `verdict`: clean, warning or defect."""
    return render(
        "audit.html.jinja",
        verdict=verdict,
        verdict_text=verdict_text,
        tokenizer_findings=tokenizer_findings,
        colours=_COLOURS,
        facts=facts,
        kinds=ALL_KINDS,
        has_pairs=has_pairs,
        rows=[_shown(record) for record in records],
    )


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded row as the page shows it."""
    sides = _sides(record)
    findings = [finding | {"side": name} for name, side in sides.items() for finding in side["findings"] or []]
    cut = {name: side["length"] - len(side["ids"]) for name, side in sides.items()}
    tags = [("note" if kind in NOTES else "bad", kind) for kind in sorted({finding["kind"] for finding in findings})]
    if record["format"] == TEXT:
        tags = [("note", TEXT)]
    elif not findings and not any(cut.values()):
        tags = [
            ("note", "not audited") if any(side["findings"] is None for side in sides.values()) else ("good", "clean")
        ]
    for name, side in sides.items():
        if cut[name]:
            tags.append(("warn", f"{name} cut: {len(side['ids']):,} of {side['length']:,} tokens".lstrip()))
    first = next(iter(sides.values()))
    about = [f"row {record['row']}" if record["row"] is not None else "outside the data set, or streamed"]
    about += [", ".join(span["role"] for span in first["roles"])] if first["roles"] else []
    about += [
        f"{name} {sum(side['mask'])} of {len(side['mask'])} tokens trained".lstrip() for name, side in sides.items()
    ]
    return {
        "place": short(record["place"]),
        "tags": tags,
        "facts": "; ".join(about),
        "findings": [finding | {"where": where(finding)} for finding in findings],
        **_parts(sides, cut),
    }


def _parts(sides: dict[str, dict[str, Any]], cut: dict[str, int]) -> dict[str, Any]:
    """The tokens of a row as the page shows them: all as one `side`; of a pair the `prompt`, then each answer."""
    shown = {name: list(_tokens(side)) for name, side in sides.items()}
    starts = {name: side["mask"].index(1) if name and 1 in side["mask"] else 0 for name, side in sides.items()}
    prompts = [tokens[: starts[name]] for name, tokens in shown.items()]
    return {
        "prompt": max(prompts, key=lambda tokens: sum(" f" in token["classes"] for token in tokens)),
        "sides": [{"name": name, "tokens": tokens[starts[name] :], "cut": cut[name]} for name, tokens in shown.items()],
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
        what = f"{a['rows']:,} {_noun(a)}s, token by token with the same mask"
        return True, f"the same {what} (stream sha256 {hashes[0]})"
    lines = [f"different streams: {hashes[0]} and {hashes[1]}"]
    for name in ("rows", "mask", "max_length", "template_sha256", "eos_token"):
        if a[name] != b[name]:
            lines.append(f"  {name}: {a[name]} and {b[name]}")
    if _noun(a) != _noun(b):
        return False, "\n".join([*lines, f"  one is of {_noun(a)}s, the other of {_noun(b)}s"])
    others = {row["row"]: row for row in rows_b if row["row"] is not None}
    pairs = [(row, others[row["row"]]) for row in rows_a if row["row"] in others]
    for row_a, row_b in sorted(pairs, key=lambda pair: pair[0]["row"]):
        for (name, side_a), side_b in zip(_sides(row_a).items(), _sides(row_b).values(), strict=True):
            if (side_a["ids"], side_a["mask"]) != (side_b["ids"], side_b["mask"]):
                place = f"row {row_a['row']}, {name}".rstrip(", ")
                return False, "\n".join([*lines, _first_difference(place, side_a, side_b)])
    size = a["digest_rows"]
    blocks = [[summary["digests"][at : at + 8] for at in range(0, len(summary["digests"]), 8)] for summary in (a, b)]
    differing = [number for number, (x, y) in enumerate(zip_longest(*blocks)) if x != y]
    if differing and size == b["digest_rows"]:
        last = (differing[0] + 1) * size - 1
        place = f"row {last}" if size == 1 else f"one of the rows {last - size + 1}-{last}"
        lines.append(f"  first difference: {place}, which these files do not record (audit.rows={last + 1} would)")
    return False, "\n".join(lines)


def _first_difference(place: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    tokens = zip_longest(zip(a["ids"], a["mask"], strict=True), zip(b["ids"], b["mask"], strict=True))
    at = next(number for number, (token_a, token_b) in enumerate(tokens) if token_a != token_b)

    def token(row: dict[str, Any]) -> str:
        if at >= len(row["ids"]):
            return "the row ends"
        return f"{row['tokens'][at]!r} (id {row['ids'][at]}, {'trained' if row['mask'][at] else 'context'})"

    before = bytes.fromhex("".join(a["bytes"][max(0, at - 8) : at])).decode(errors="replace")
    return f"  first difference: {place}, token {at}, after {before!r}: {token(a)} and {token(b)}"


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        return [line for line in lines if "row" in line], next(line["summary"] for line in lines if "summary" in line)
    except (OSError, ValueError, StopIteration, TypeError) as error:
        raise UserError(f"{path} is no template audit: {error or 'it has no summary line'}") from None
