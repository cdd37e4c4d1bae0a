"""Conversations to `input_ids` and `labels`, in batches.

The labels are what the chat template's generation markers (or the oracle's spans) say. The text is cut into pieces at their
boundaries and each piece is tokenized by itself, so that no token straddles the boundary between prompt and answer: for an
answer that starts with a newline Qwen2.5 would merge `\\n` + `\\n` into one token, which at inference, where the prompt ends with
its own `\\n`, can never be generated.
"""

import contextlib
import gc
import hashlib
import inspect
import json
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from atlas.audit import spans, tokens
from atlas.audit.spans import IGNORED, AuditRow, Oracle, RowAudit, Turn, cut, special_token_texts
from atlas.console import one_line
from atlas.data import formats, sources
from atlas.data.formats import (
    BadRowError,
    Conversation,
    conversation,
    refuse_special_tokens,
    refuse_surrogates,
    renamed,
)
from atlas.data.ledger import EMPTY_MASK, FULLY_TRUNCATED
from atlas.models import template
from atlas.models.template import Renderer, TemplateRefusedError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

REFUSED = "refused by the template"
TOO_MANY_TURNS = "too many turns"
# The oracle renders the conversation anew for every answer, so that its time grows with the square of their number: 1.0 s for one
# row of so many messages, 4.0 s for one of twice as many (a ChatML template, one core).
MOST_MESSAGES = 512
# What ends a document in pretraining, by family; the tokenizer's eos has become the chat's stop token.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


# transformers keeps the spans of the markers in the compiled template, which threads share: two renderings at a time mix them up
# (interleaved streams are read in threads; the audit found one row in 900 with its neighbour's spans).
_one_at_a_time = threading.Lock()

_ENCODED_AT_ONCE = 256  # rows


@dataclass
class LabeledRow:
    """One row on its way to ids and labels; `reason` says why it dropped out."""

    parsed: Conversation | None = None
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Characters of the text that are supervised."""
    turns: list[Turn] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens before truncation."""
    supervised: int = 0
    """Supervised tokens before truncation."""
    reason: str = ""
    detail: str = ""
    audit: RowAudit | None = None

    @cached_property
    def packed_ids(self) -> bytes:
        return array("i", self.ids).tobytes()

    @cached_property
    def packed_labels(self) -> bytes:
        return array("i", self.labels).tobytes()

    @property
    def is_document(self) -> bool:
        """Plain text, of which every token is supervised."""
        return self.parsed is not None and self.parsed.text is not None


class Labeler:
    """Callable for `Dataset.map(batched=True)`: rows in, `input_ids`, `labels` and what became of each row out.

    `mask` is "markers" (labels from the template's generation markers) or "rendered" (from the oracle's spans). With `audited`
    the labels of every row are compared with the oracle, and the findings are a column.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None = None,
        *,
        mask: str = "markers",
        assistant_only: bool = True,
        audited: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        serialized = tokenizer.backend_tokenizer.to_str()
        self._backend_sha256 = hashlib.sha256(serialized.encode()).hexdigest()
        self.backend = type(tokenizer.backend_tokenizer).from_str(serialized)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.ascii_backend = self.backend
        if type(self.backend.normalizer).__name__ in ("NFC", "NFD", "NFKC", "NFKD"):
            # They leave ASCII as it is, and take a tenth of the time to find that out.
            self.ascii_backend = type(self.backend).from_str(self.backend.to_str())
            self.ascii_backend.normalizer = None
        self.renderer = Renderer(tokenizer)
        self.max_length = max_length
        self.mask = mask
        self.assistant_only = assistant_only
        self.audited = audited and assistant_only  # a loss on whole sequences is meant to fall on prompts too
        self.special = special_token_texts(tokenizer)
        self.document_end = next((end for end in _DOCUMENT_ENDS if end in self.special), tokenizer.eos_token or "")
        self.oracle = Oracle(tokenizer) if self.audited or mask == "rendered" else None

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that the labels depend on: tokenizer, template, settings and this code."""
        digest = hashlib.sha256()
        for part in (
            self._backend_sha256,
            str(self.tokenizer.chat_template),
            str(self.tokenizer.special_tokens_map),
            f"{self.max_length} {self.mask} {self.assistant_only} {self.audited}",
            *(
                inspect.getsource(module)
                for module in (formats, sources, spans, tokens, template, sys.modules[__name__])
            ),
            *(version(package) for package in ("transformers", "tokenizers", "jinja2")),
        ):
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()

    def label(self, given: Iterable["str | Mapping[str, Any]"], format_name: str = "messages") -> list[LabeledRow]:
        """Rows of a source (JSON texts or mappings of columns) with all that is known of them, in order."""
        rows: list[LabeledRow] = []
        # The tokenizer's Rust code runs without the interpreter's lock: while it encodes some rows, those before them are
        # labelled and audited and those after them are rendered.
        with ThreadPoolExecutor(1) as pool:
            waiting, before = iter(given), None
            while some := [self._rendered(row, format_name) for row in islice(waiting, _ENCODED_AT_ONCE)]:
                if self.mask == "rendered":
                    self._find_turns(some)  # which says what is supervised, and so where the text is cut
                encoded = pool.submit(self._encode, some)
                if self.mask != "rendered" and self.audited:
                    self._find_turns(some)
                if before is not None:
                    self._finish(*before)
                before = some, encoded
                rows += some
            if before is not None:
                self._finish(*before)
        return rows

    def _finish(self, rows: list[LabeledRow], encoded: Future[list[list[tuple[list[int], bool]]]]) -> None:
        self._label(rows, encoded.result())
        if self.audited and self.oracle is not None:
            kept = [row for row in rows if not row.reason and not row.is_document]
            audits = self.oracle.audit([_audit_row(row) for row in kept], [row.turns for row in kept])
            for row, audit in zip(kept, audits, strict=True):
                row.audit = audit

    def __call__(
        self,
        batch: Mapping[str, list[Any]],
        format_name: str = "messages",
        group_by: str | None = None,
        renaming: Mapping[str, str] | None = None,
    ) -> "pa.Table":
        """`columns` as a table: Arrow takes over ids and labels as they lie in memory, not number by number."""
        import pyarrow as pa

        given = [renamed(row, renaming or {}) for row in _rows(batch)]
        rows, facts = self._facts(given, format_name, group_by)
        columns: dict[str, Any] = {}
        for name, packed in (
            ("input_ids", [row.packed_ids for row in rows]),
            ("labels", [row.packed_labels for row in rows]),
        ):
            ends = pa.array(accumulate((len(numbers) // 4 for numbers in packed), initial=0), pa.int32())
            values = pa.Array.from_buffers(pa.int32(), ends[-1].as_py(), [None, pa.py_buffer(b"".join(packed))])
            columns[name] = pa.ListArray.from_arrays(ends, values)
        return pa.table(columns | facts)

    def columns(
        self, given: Sequence["str | Mapping[str, Any]"], format_name: str = "messages", group_by: str | None = None
    ) -> dict[str, list[Any]]:
        """What is kept of each row: ids and labels, token counts, hashes, and why it dropped out or what the audit found."""
        rows, facts = self._facts(given, format_name, group_by)
        return {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows], **facts}

    def _facts(
        self, given: Sequence["str | Mapping[str, Any]"], format_name: str, group_by: str | None
    ) -> tuple[list[LabeledRow], dict[str, list[Any]]]:
        with _one_at_a_time, _without_collector():
            rows = self.label(given, format_name)
        prompts = [_digest(row.parsed.prompt.encode()) if row.parsed else 0 for row in rows]
        return rows, {
            "length": [row.length for row in rows],
            "tokens": [len(row.ids) for row in rows],
            "all_supervised": [row.supervised for row in rows],
            "supervised": [len(row.labels) - row.labels.count(IGNORED) for row in rows],
            "digest": [_digest(row.packed_ids + row.packed_labels) for row in rows],
            "prompt": prompts,
            "group": [_group(r, group_by) if row.parsed else None for r, row in zip(given, rows, strict=True)],
            "reason": [row.reason for row in rows],
            "detail": [one_line(row.detail) for row in rows],
            "findings": [
                json.dumps([f.as_json() for f in r.audit.findings]) if r.audit and r.audit.findings else ""
                for r in rows
            ],
            "cut_stops": [row.audit.cut_stops if row.audit else 0 for row in rows],
            "cut_answers": [row.audit.cut_answers if row.audit else 0 for row in rows],
        }

    def parse(self, given: "str | Mapping[str, Any]", format_name: str = "messages") -> Conversation:
        """A source's row as a conversation without forged special tokens; raises `BadRowError`."""
        parsed = conversation(given, format_name)
        refuse_special_tokens(parsed, self.special)
        return parsed

    def _rendered(self, given: "str | Mapping[str, Any]", format_name: str) -> LabeledRow:
        try:
            parsed = self.parse(given, format_name)
        except BadRowError as error:
            return LabeledRow(reason=error.reason, detail=error.detail)
        if parsed.text is not None:
            text = parsed.text + self.document_end
            return LabeledRow(parsed, text, [(0, len(text))])
        if self.oracle is not None and len(parsed.messages) > MOST_MESSAGES:
            detail = f"{len(parsed.messages):,} messages; at most {MOST_MESSAGES} are audited: split the conversation"
            return LabeledRow(reason=TOO_MANY_TURNS, detail=detail)
        try:
            if self.mask == "markers":
                row = LabeledRow(parsed, *self.renderer.marked(parsed.messages, parsed.tools))
            else:
                row = LabeledRow(parsed, self.renderer.text(parsed.messages, parsed.tools))
            refuse_surrogates(row.text, "what the template writes")  # from a call's arguments, or a message's name
            return row
        except BadRowError as error:
            return LabeledRow(reason=error.reason, detail=error.detail)
        except TemplateRefusedError as error:
            return LabeledRow(reason=REFUSED, detail=error.problem)

    def _find_turns(self, rows: list[LabeledRow]) -> None:
        def find(some: list[LabeledRow]) -> None:
            given = [(row.parsed.messages, row.parsed.tools, row.text) for row in some if row.parsed]
            for row, turns in zip(some, self.oracle.turns(given) if self.oracle else [], strict=True):
                row.turns = turns
                if self.mask == "rendered":
                    row.spans = [(turn.start, turn.end) for turn in turns]

        good = [row for row in rows if row.parsed and not row.is_document]
        try:
            find(good)
        except TemplateRefusedError:
            for row in good:  # one of them: find out which
                try:
                    find([row])
                except TemplateRefusedError as error:
                    row.reason, row.detail = REFUSED, f"the prompt of an answer: {error.problem}"

    def _encode(self, rows: list[LabeledRow]) -> list[list[tuple[list[int], bool]]]:
        """For each row the ids of its pieces, and whether they are supervised."""
        cut_rows = [[piece for piece in cut(row.text, row.spans) if piece[0]] for row in rows]
        texts: dict[bool, list[str]] = {True: [], False: []}
        for pieces in cut_rows:
            for text, _ in pieces:
                texts[text.isascii()].append(text)
        encoded = {
            True: iter(self.ascii_backend.encode_batch_fast(texts[True], add_special_tokens=False)),
            False: iter(self.backend.encode_batch_fast(texts[False], add_special_tokens=False)),
        }
        return [[(next(encoded[text.isascii()]).ids, supervised) for text, supervised in pieces] for pieces in cut_rows]

    def _label(self, rows: list[LabeledRow], encoded: list[list[tuple[list[int], bool]]]) -> None:
        for row, pieces in zip(rows, encoded, strict=True):
            if row.reason:
                continue
            for piece, supervised in pieces:
                row.ids += piece
                row.labels += piece if supervised or not self.assistant_only else [IGNORED] * len(piece)
            row.length, row.supervised = len(row.ids), len(row.labels) - row.labels.count(IGNORED)
            row.ids, row.labels = row.ids[: self.max_length], row.labels[: self.max_length]
            if not row.supervised and not self.audited:
                row.reason, row.detail = EMPTY_MASK, "nothing is marked as the answer"
            elif row.supervised and row.labels.count(IGNORED) == len(row.labels):
                row.reason = FULLY_TRUNCATED
                row.detail = f"{row.length} tokens; the answer starts after max_length {self.max_length}"
            if row.reason:
                row.ids, row.labels = [], []


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's cycle collector goes over every list of tokens again and again (a quarter of the time), and finds no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _digest(content: bytes) -> int:
    """64 bits: among a million rows two that differ have the same with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _group(given: "str | Mapping[str, Any]", column: str | None) -> int | None:
    if column is None:
        return None
    value = (json.loads(given) if isinstance(given, str) else given).get(column)
    return None if value is None else _digest(json.dumps(value, default=str).encode())


def _audit_row(row: LabeledRow) -> AuditRow:
    assert row.parsed is not None  # kept rows are parsed
    return AuditRow(row.parsed.messages, row.parsed.tools, row.text, row.ids, row.labels)


def _rows(batch: Mapping[str, list[Any]]) -> Iterator["str | Mapping[str, Any]"]:
    if list(batch) == sources.JSON_COLUMNS:
        yield from batch["json"]
        return
    for index in range(len(next(iter(batch.values())))):
        yield {name: column[index] for name, column in batch.items()}
