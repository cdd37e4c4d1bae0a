"""The audit of labels that other code has made: a collator's batches, or the rows of a data set.

Each row is compared with what the model has to generate in its conversation (`atlas.auditing.spans`).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import accumulate, islice, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.auditing.content import excerpt
from atlas.auditing.report import page_of, record, role_spans
from atlas.auditing.spans import (
    IGNORED,
    KINDS,
    NOTES,
    AuditRow,
    Finding,
    Oracle,
    RowAudit,
    Turn,
    tokenizer_findings,
    where,
)
from atlas.auditing.tokens import token_bytes
from atlas.config.schema import TEXT
from atlas.console import visible
from atlas.data.formats import BadRowError, Conversation, conversation, detect, refuse_special_tokens
from atlas.data.sources import DETECT_ROWS, conversations
from atlas.errors import UserError
from atlas.files import write_text, writing
from atlas.models.template import TemplateRefusedError
from atlas.pages import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IDS = ("input_ids", "tokens")  # the second is torchtune's
_MASKS = ("assistant_masks", "completion_mask")  # of TRL's data sets; its collator makes the labels from them
_LENGTHS = ("seq_lengths", "seq_lens")  # of the sequences that are packed in a row; the second is torchtune's
_POSITIONS = ("position_ids", "input_pos")  # in their own sequence; the second is torchtune's
_SHOWN = 20, 5  # rows on the page: with findings, and without
_EXAMPLES = 3  # rows named for each finding in the text
_AT_ONCE = 256  # rows


@dataclass(frozen=True)
class AuditedRow:
    """What the audit says of one row."""

    number: int
    """Its place among the rows that were given, from 0. A row that holds several sequences counts as so many rows."""
    conversation: int | None
    """The number of its conversation, from 0; None where no conversation has these tokens."""
    findings: tuple[Finding, ...]
    """In the order of the row; empty for a row that is right."""
    tokens: int
    """Without padding."""
    trained: int
    """How many of them the loss falls on."""
    is_cut: bool = False
    """The row ends at `max_length`, before its last stop token."""
    problem: str | None = None
    """Why nothing can be said of the row; None: it was judged."""


@dataclass(frozen=True, repr=False)
class AuditReport:
    """What `audit` found. `print(report)`, and a notebook, show the summary."""

    rows: tuple[AuditedRow, ...]
    """One for each row, in the order in which they were given."""
    tokenizer_findings: tuple[Finding, ...]
    """What concerns the tokenizer, and so every row: its eos is not the token that ends an answer, or pad is that token."""
    unused: int
    """Conversations of which there is no row."""
    tokens_of: dict[str, str | None]
    """The token that ends an answer (`stop`), and the tokenizer's `eos` and `pad`."""
    _records: tuple[dict[str, Any], ...] = ()

    @property
    def ok(self) -> bool:
        """True where every row could be judged and nothing was found. Notes (`trimmed`, `rewritten`) do not count."""
        return not self._faults() and not self.not_judged

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows for each kind of finding. A finding on the tokenizer counts as one row."""
        kinds = Counter(kind for row in self.rows for kind in {finding.kind for finding in row.findings})
        kinds.update(finding.kind for finding in self.tokenizer_findings)
        return {kind: kinds[kind] for kind in KINDS if kinds[kind]}

    @property
    def not_judged(self) -> int:
        """Rows of which nothing can be said; each says why in its `problem`."""
        return sum(row.problem is not None for row in self.rows)

    def raise_for_findings(self, allow: Collection[str] = ()) -> None:
        """Raise `UserError` with the summary, unless all is well.

        Args:
            allow: Kinds of findings that are accepted, for example `["leak"]`.
        """
        if unknown := [kind for kind in allow if kind not in KINDS]:
            raise UserError(f"allow: the audit knows no finding {unknown[0]!r}; it knows {', '.join(KINDS)}")
        if self._faults() - {*allow} or self.not_judged:
            raise UserError(str(self))

    def write_page(self, path: str | Path) -> Path:
        """Write an HTML page with the summary, and up to 20 rows with findings and 5 without, token by token. It quotes the rows.

        Returns:
            The path.

        Raises:
            RunError: The file cannot be written.
        """
        path, (verdict, text) = Path(path), self._verdict
        of_tokenizer = [finding.text for finding in self.tokenizer_findings]
        with writing(path, "make room, or choose another file"):
            write_text(path, page_of(list(self._records), self._facts(), verdict, text, of_tokenizer))
        return path

    def __repr__(self) -> str:
        verdict, text = self._verdict
        lines = [f"audit {verdict}: {text}", *(f"  {name:<17}{value}" for name, value in self._facts())]
        lines += [f"  stop: {finding.text}" for finding in self.tokenizer_findings]
        for kind in self.counts:
            found = [(row, next(f for f in row.findings if f.kind == kind)) for row in self._with(kind)]
            lines += [f"  {kind}: {KINDS[kind].meaning}"] if found else []
            lines += [f"    row {row.number}, {where(f.as_json())}: {f.text!r}" for row, f in found[:_EXAMPLES]]
        judged_not = [row for row in self.rows if row.problem]
        lines += [f"  row {row.number} is not judged: {row.problem}" for row in judged_not[:_EXAMPLES]]
        return visible("\n".join(lines))

    def _with(self, kind: str) -> list[AuditedRow]:
        return [row for row in self.rows if any(finding.kind == kind for finding in row.findings)]

    def _faults(self) -> set[str]:
        return self.counts.keys() - {*NOTES}

    @property
    def _verdict(self) -> tuple[str, str]:
        kinds = sorted(self.counts, key=lambda kind: kind in NOTES)
        parts = [f"{kind} in {counted(len(rows), 'row')}" for kind in kinds if (rows := self._with(kind))]
        parts += ["stop (tokenizer)"] if self.tokenizer_findings else []
        parts += [f"{counted(self.not_judged, 'row')} not judged"] if self.not_judged else []
        right = ["the loss falls on exactly what the model must generate"] if self.ok else []
        return "clean" if self.ok else "defect", "; ".join([*right, *parts])

    def _facts(self) -> list[tuple[str, str]]:
        tokens, trained = (sum(getattr(row, name) for row in self.rows) for name in ("tokens", "trained"))
        cut, unused = sum(row.is_cut for row in self.rows), self.unused
        rows = f"{len(self.rows):,}" + (f"; {counted(unused, 'conversation')} without a row" if unused else "")
        return [
            ("rows", rows + (f"; {cut:,} cut at max_length" if cut else "")),
            ("trained", f"{trained:,} of {tokens:,} tokens ({trained / max(tokens, 1):.1%})"),
            ("stop / eos / pad", " / ".join(map(str, self.tokens_of.values()))),
        ]


class _Row:
    """One sequence of a batch, without its padding."""

    def __init__(self, number: int, ids: list[int], labels: list[int], hidden: list[bool]) -> None:
        self.number, self.shift = number, _shift(ids, labels)
        if self.shift:
            labels = [IGNORED, *labels[:-1]] if self.shift > 0 else [*labels[1:], IGNORED]
        seen = [at for at, (out, label) in enumerate(zip(hidden, labels, strict=True)) if not out or label != IGNORED]
        first, end = (seen[0], seen[-1] + 1) if seen else (0, 0)
        self.ids, self.labels = ids[first:end], labels[first:end]
        self._before, self._after = ids[:first], ids[end:]

    def spelled(self, table: Mapping[int, bytes]) -> bytes:
        return b"".join(table[token] for token in self.ids)

    # What looks like padding may be the text's own: where pad is the token with which a text begins, or ends.

    def take_back_start(self, text: bytes, table: Mapping[int, bytes]) -> None:
        if self._before and text.startswith(table[self._before[-1]]):
            self.ids, self.labels = [self._before[-1], *self.ids], [IGNORED, *self.labels]

    def take_back_end(self, text: bytes, table: Mapping[int, bytes]) -> None:
        at = len(self.spelled(table))
        for token in self._after:
            if not text.startswith(table[token], at):
                break
            self.ids.append(token)
            self.labels.append(IGNORED)
            at += len(table[token])


class _Conversations:
    """The conversations, rendered when they are asked for."""

    def __init__(
        self,
        given: Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
        oracle: Oracle,
        last_answer_only: bool,
    ) -> None:
        self.oracle, self.last_answer_only = oracle, last_answer_only
        self._given = list(conversations(given, "audit"))
        if not self._given:
            raise UserError("audit: there are no conversations")
        self._format = detect(self._given[:DETECT_ROWS], "the conversations")
        if self._format == TEXT:
            raise UserError("audit: plain text has no answers: give conversations, with messages")
        self.parsed = [self._parsed(row) for row in self._given]
        self._texts: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._given)

    def _parsed(self, row: Mapping[str, Any]) -> Conversation | str:
        """The conversation, or why it is none."""
        try:
            return conversation(row, self._format)
        except BadRowError as error:
            return f"its conversation: {error.reason} ({error.detail})"

    def text(self, index: int) -> bytes:
        """As the tokenizer takes it; empty where there is none."""
        if index not in self._texts:
            parsed, text = self.parsed[index], ""
            if isinstance(parsed, Conversation):
                try:
                    text = self.oracle.renderer.text(parsed.messages, parsed.tools)
                    text = self.oracle.normalize(text)
                except TemplateRefusedError as error:
                    self.parsed[index] = f"its conversation: refused by the template ({error.problem})"
            self._texts[index] = text.encode(errors="replace")
        return self._texts[index]

    def turns(self, index: int, text: str) -> list[Turn]:
        """The answers that are to be trained. Raises `TemplateRefusedError`."""
        parsed = self.parsed[index]
        assert isinstance(parsed, Conversation)
        turns = self.oracle.turns(parsed.messages, parsed.tools, text)
        if self._format == "prompt-completion":
            completion = self._given[index]["completion"]
            first = len(parsed.messages) - (1 if isinstance(completion, str) else len(completion))
            turns = [turn for turn in turns if turn.message >= first]
        return turns[-1:] if self.last_answer_only else turns

    @cached_property
    def _sorted(self) -> list[tuple[bytes, int]]:
        return sorted((text, index) for index in range(len(self)) if (text := self.text(index)))

    def unused(self, used: set[int]) -> int:
        """How many conversations have no row. Rows found by their text stand for all conversations that are equal."""
        left = [index for index in range(len(self)) if index not in used]
        if "_sorted" not in vars(self):
            return len(left)
        texts = {self.text(index) for index in used}
        return sum(self.text(index) not in texts for index in left)

    def of(self, number: int, spelled: bytes) -> int | None:
        """Whose tokens these are: of the conversation in the row's place, if its text is the same as far as the row goes; else of
        the one with the longest beginning in common, if there is any."""
        own = number if number < len(self) else None
        if own is not None and self.text(own).startswith(spelled):
            return own
        at = bisect_left(self._sorted, (spelled,))  # the neighbours have the longest beginnings in common
        near = [own] if own is not None else []
        near += [index for _, index in self._sorted[max(at - 1, 0) : at + 1]]
        shared, found = max(((_shared(self.text(index), spelled), index) for index in near), key=lambda one: one[0])
        is_own = own is not None and isinstance(self.parsed[own], str) and shared < len(spelled)
        return found if shared and not is_own else own


def audit_labels(
    conversations: Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    rows: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    max_length: int | None,
    last_answer_only: bool,
    ignore_index: int,
) -> AuditReport:
    """See `atlas.audit`."""
    _refuse(tokenizer)
    oracle, table = Oracle(tokenizer, date.today()), token_bytes(tokenizer)
    given = _Conversations(conversations, oracle, last_answer_only)
    batches = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(batches, Iterable):
        raise UserError(f"audit: the rows are a {type(rows).__name__}, not mappings with input_ids and labels")
    pad = None if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    read = _rows(batches, table, pad, ignore_index)
    audited: list[AuditedRow] = []
    bad: list[dict[str, Any]] = []
    good: list[dict[str, Any]] = []
    while some := list(islice(read, _AT_ONCE)):
        for row, kept in _judged(some, given, table, max_length):
            audited.append(row)
            chosen = bad if {f.kind for f in row.findings} - {*NOTES} else good
            if kept and len(chosen) < _SHOWN[chosen is good]:
                chosen.append(_record(row, *kept, given, table))
    if not audited:
        raise UserError("audit: there are no rows with labels")
    return AuditReport(
        rows=tuple(audited),
        tokenizer_findings=tuple(tokenizer_findings(tokenizer)),
        unused=given.unused({row.conversation for row in audited if row.conversation is not None}),
        tokens_of={"stop": oracle.stop, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token},
        _records=(*bad, *good),
    )


def _refuse(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        more = ": give its `.tokenizer`" if hasattr(tokenizer, "tokenizer") else ""
        raise UserError(
            f"audit: {type(tokenizer).__name__} is no fast tokenizer of transformers, whose bytes atlas can tell{more}"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"audit: the tokenizer {tokenizer.name_or_path!r} has no chat template. Set `tokenizer.chat_template` to the one with "
            "which the rows were made"
        )


def _listed(value: Any) -> Any:
    """A tensor or an array as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _rows(
    batches: Iterable[Mapping[str, Any]], table: Mapping[int, bytes], pad: int | None, ignore_index: int
) -> Iterator[_Row]:
    """The sequences of all batches. Raises `UserError` for what is none."""
    number = 0
    for at, batch in enumerate(batches):
        place = f"audit: batch or row {at}"
        if not isinstance(batch, Mapping):
            raise UserError(f"{place} is a {type(batch).__name__}, not a mapping with input_ids and labels")
        name = next((name for name in _IDS if name in batch), None)
        if name is None:
            raise UserError(f"{place} has no input_ids. It has: {', '.join(map(str, batch)) or 'nothing'}")
        wanted = ("labels", *_MASKS, "attention_mask", *_POSITIONS, *_LENGTHS)
        columns = {"ids": _listed(batch[name])}
        columns |= {key: _listed(batch[key]) for key in wanted if key in batch and batch[key] is not None}
        if not {"labels", *_MASKS} & columns.keys():
            raise UserError(
                f"{place} has no labels, and none of {', '.join(_MASKS)}. It has: {', '.join(map(str, batch))}"
            )
        if columns["ids"] and isinstance(_listed(columns["ids"][0]), list):
            size = len(columns["ids"])
            columns = {key: [_listed(one) for one in value] for key, value in columns.items()}
            for key in ("labels", *_MASKS):
                if len(columns.get(key, columns["ids"])) != size:
                    raise UserError(f"{place}: {size} rows of input_ids, but {len(columns[key])} of {key}")
            if size == 1:  # what is said of the one row may stand there without the dimension of the batch
                columns = {k: value if isinstance(value[0], list) else [value] for k, value in columns.items() if value}
            each = [{key: value[i] for key, value in columns.items() if len(value) == size} for i in range(size)]
        else:
            each = [columns]
        for one in each:
            for part in _sequences(one, place, table, pad, ignore_index):
                yield _Row(number, *part)
                number += 1


def _sequences(
    row: Mapping[str, Any], place: str, table: Mapping[int, bytes], pad: int | None, ignore_index: int
) -> Iterator[tuple[list[int], list[int], list[bool]]]:
    """Ids, labels, and what is padding, of a row; or of each sequence that is packed in it, by their lengths, their positions, or
    their numbers in the attention mask."""
    ids = row["ids"]
    unknown = next((token for token in ids if token not in table), None)
    if unknown is not None:
        raise UserError(f"{place}: {unknown!r} is no token id of the tokenizer: give the one that made the rows")
    labels = row.get("labels", ids)
    masks = [row[name] for name in _MASKS if name in row] if "labels" not in row else []
    shown = row.get("attention_mask")
    if shown is None or len(shown) != len(ids) or any(isinstance(value, list) for value in shown[:1]):
        shown = [1] * len(ids)  # none, or one of a form that says more than what is padding
    for name, values in (("labels", labels), *zip(_MASKS, masks, strict=False)):
        if len(values) != len(ids):
            raise UserError(f"{place}: {len(ids)} input_ids, but {len(values)} {name}")
    labels = [
        IGNORED if label == ignore_index or not all(one) else label for label, *one in zip(labels, *masks, strict=True)
    ]
    hidden = [token == pad or not see for token, see in zip(ids, shown, strict=True)]
    lengths = next((row[name] for name in _LENGTHS if name in row), None)
    positions = next((row[name] for name in _POSITIONS if name in row), ())
    if lengths:
        lengths = lengths if isinstance(lengths, list) else [lengths]
        if not all(hidden[sum(lengths) :]) or sum(lengths) > len(ids):
            raise UserError(f"{place}: {len(ids)} input_ids, but lengths of sequences that make {sum(lengths)}")
        starts = list(accumulate(lengths, initial=0))
    else:
        starts = [at for at, position in enumerate(positions) if position == 0 and not hidden[at]]
    if not starts and max(shown, default=0) > 1:  # each sequence has its own number
        starts = [at for at, (before, value) in enumerate(pairwise(shown), 1) if value not in (0, before)]
    parts = list(pairwise(sorted({0, *starts, len(ids)})))
    for start, end in parts:
        is_padding = all(hidden[start:end]) and all(label == IGNORED for label in labels[start:end])
        if len(parts) == 1 or not is_padding:
            yield ids[start:end], labels[start:end], hidden[start:end]


def _shift(ids: list[int], labels: list[int]) -> int:
    """By how many places the labels stand too early (1) or too late (-1); 0: each is its own token, or they are simply wrong."""
    trained = [at for at, label in enumerate(labels) if label != IGNORED]
    if all(labels[at] == ids[at] for at in trained):
        return 0
    for by in (1, -1):
        if all(0 <= at + by < len(ids) and labels[at] == ids[at + by] for at in trained):
            return by
    return 0


def _shared(a: bytes, b: bytes) -> int:
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    return len(commonprefix([a, b]))  # noqa: RUF071 (byte by byte is what is wanted)


@dataclass
class _Judged:
    """A row on its way through the audit."""

    row: _Row
    index: int | None
    problem: str = ""
    given: AuditRow | None = None
    """What the oracle judges: the row as far as it has the text of its conversation."""
    more: list[Finding] = field(default_factory=list)
    """What else is wrong."""


def _judged(
    rows: Sequence[_Row], given: _Conversations, table: Mapping[int, bytes], max_length: int | None
) -> Iterator[tuple[AuditedRow, tuple[_Row, RowAudit] | None]]:
    """What the audit says of each row, and what its record is made of."""
    judged = [_compared(row, given, table) for row in rows]
    audits = iter(given.oracle.audit([one.given for one in judged if one.given]))
    for one in judged:
        row, size = one.row, len(one.row.ids)
        trained = size - row.labels.count(IGNORED)
        if one.given is None:
            yield AuditedRow(row.number, one.index, (), size, trained, problem=one.problem), None
            continue
        audit = next(audits)
        found = [finding for finding in audit.findings if finding.kind != "empty" or not trained]
        is_whole = len(one.given.ids) == size  # else the texts part, which is said already
        is_cut = is_whole and audit.cut_stops > 0 and max_length is not None and size >= max_length
        if is_whole and audit.cut_stops and not is_cut:
            at = len(row.spelled(table))
            turn, span = next(both for both in zip(one.given.turns, audit.spans, strict=True) if both[1][1] > at)
            end = one.given.text[turn.start : turn.end][-40:]
            found.append(Finding("missing", turn.message, *span, f"the row ends before the end of {end!r}"))
        found = sorted([*found, *one.more], key=lambda finding: finding.start)
        yield (
            AuditedRow(row.number, one.index, tuple(found), size, trained, is_cut),
            (row, audit._replace(findings=found)),
        )


def _compared(row: _Row, given: _Conversations, table: Mapping[int, bytes]) -> _Judged:
    """A row and its conversation: what the oracle is to judge, and what is wrong besides."""
    row.take_back_start(given.text(min(row.number, len(given) - 1)), table)
    index = given.of(row.number, row.spelled(table))
    if index is None:
        return _Judged(row, None, "no conversation has these tokens")
    expected, parsed = given.text(index), given.parsed[index]
    if isinstance(parsed, str):
        return _Judged(row, index, parsed)
    row.take_back_end(expected, table)
    if not row.ids:
        return _Judged(row, index, "it has no tokens")
    text = given.oracle.renderer.text(parsed.messages, parsed.tools)
    try:
        turns = given.turns(index, text)
    except TemplateRefusedError as error:
        return _Judged(row, index, f"its conversation: refused by the template ({error.problem})")
    more, spelled, kept = [], row.spelled(table), len(row.ids)
    try:
        refuse_special_tokens(parsed, given.oracle.special)
    except BadRowError as error:
        more.append(Finding("injected", -1, 0, 0, error.detail))
    if row.shift:
        which = "next" if row.shift > 0 else "previous"
        more.append(
            Finding(
                "text", -1, 0, 0, f"each label is the {which} token: models of transformers shift labels themselves"
            )
        )
    if plain := given.oracle.in_ordinary_tokens(row.ids, spelled):
        start, token = plain
        said = f"{token!r} stands here in ordinary tokens, but the tokenizer has a token of its own for it"
        more.append(Finding("text", -1, start, start + len(token.encode()), said))
    if (shared := _shared(expected, spelled)) < len(spelled):  # what follows is another text, and is not judged
        ends = list(accumulate(len(table[token]) for token in row.ids))
        kept = sum(end <= shared for end in ends)
        theirs, ours = (excerpt(text[shared:].decode(errors="replace"), 30) for text in (spelled, expected))
        if ours:
            said = f"{theirs!r} stands where the template has {ours!r}; what follows is not judged"
            more.append(Finding("text", -1, shared, len(spelled), said))
        elif any(label != IGNORED for label in row.labels[kept:]):
            more.append(Finding("leak", -1, shared, len(spelled), theirs))
    return _Judged(row, index, "", AuditRow(parsed.messages, text, turns, row.ids[:kept], row.labels[:kept]), more)


def _record(
    audited: AuditedRow, row: _Row, audit: RowAudit, given: _Conversations, table: dict[int, bytes]
) -> dict[str, Any]:
    """For the page."""
    assert audited.conversation is not None
    parsed, oracle = given.parsed[audited.conversation], given.oracle
    assert isinstance(parsed, Conversation)
    roles = role_spans(oracle.renderer, oracle.normalize, parsed.messages, parsed.tools)
    shown = record(oracle.tokenizer, table, row.ids, row.labels, roles, audit, len(row.ids))
    place = f"row {audited.number}, conversation {audited.conversation}"
    return {"row": audited.number, "place": place, "format": "messages", **shown}
