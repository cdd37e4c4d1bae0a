"""Conversations to `input_ids` and `labels`, in batches.

The labels are what the chat template's generation markers (or the oracle's spans) say. The text is cut into pieces at their
boundaries and each piece is tokenized by itself, so that no token straddles the boundary between prompt and answer: for an
answer that starts with a newline Qwen2.5 would merge `\\n` + `\\n` into one token, which at inference, where the prompt ends with
its own `\\n`, can never be generated.
"""

import gc
import hashlib
import inspect
import json
import sys
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate, islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from atlas.auditing import content, spans, tokens
from atlas.auditing.spans import IGNORED, AuditRow, Oracle, RowAudit, Turn, cut, special_token_texts
from atlas.config import Config
from atlas.console import one_line
from atlas.data import formats, sources
from atlas.data.formats import (
    FORMATS,
    BadRowError,
    Conversation,
    Format,
    conversation,
    refuse_special_tokens,
    renamed,
)
from atlas.data.ledger import EMPTY_MASK, FULLY_TRUNCATED, SourceLedger
from atlas.files import digest
from atlas.models import template
from atlas.models.template import Renderer, TemplateRefusedError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

REFUSED = "refused by the template"
TOO_MANY_TURNS = "too many turns"
# The oracle renders the conversation again for every answer, so its time grows with the square of their number: 1.0 s for a row of
# 512 messages, 4.0 s for one of 1,024 (a ChatML template, one core).
MOST_MESSAGES = 512
# What ends a document in pretraining, by model family; the tokenizer's eos has been set to the chat's stop token.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


# transformers keeps the spans of the markers in the compiled template, which threads share, and interleaved streams are read in
# threads: without this lock the audit found one row in 900 with the spans of another.
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
    """Supervised tokens within `max_length`."""
    lost: int = 0
    """Supervised tokens beyond `max_length`."""
    reason: str = ""
    detail: str = ""
    audit: RowAudit | None = None

    @property
    def lists(self) -> tuple[list[int], ...]:
        """What the trainer gets, in the order of `Labeler.columns`."""
        return self.ids, self.labels

    @property
    def size(self) -> int:
        """Tokens that a batch is filled to."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.ids)

    @property
    def sides(self) -> dict[str, "LabeledRow"]:
        """The conversations of the row, by name."""
        return {"": self}


class Labeler:
    """Callable for `Dataset.map(batched=True)`: rows in, `input_ids`, `labels` and what became of each row out.

    Another kind of rows is a class on top of this one. `mask` is "markers" (labels from the template's generation markers) or
    "rendered" (from the oracle's spans). With `audited` the labels of every row are compared with the oracle, and the findings
    are a column.
    """

    phase: ClassVar = "sft"
    code: ClassVar[tuple[ModuleType, ...]] = (content, formats, sources, spans, tokens, template, sys.modules[__name__])
    """The modules on which the labels depend."""
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    """What the trainer gets of each row."""
    counts: ClassVar[tuple[str, ...]] = ("length", "size", "tokens", "supervised", "lost")
    """Numbers of a `LabeledRow` that the ledger needs."""
    formats: ClassVar[Mapping[str, Format]] = FORMATS
    kinds: ClassVar[Mapping[str, spans.Kind]] = spans.KINDS
    """What the audit can find."""
    ledger: ClassVar[type[SourceLedger]] = SourceLedger
    row: ClassVar[type[LabeledRow]] = LabeledRow
    between: ClassVar = b""
    """Stands between the columns of a row when it is hashed: nothing where all have one length."""

    @classmethod
    def of(cls, config: Config, tokenizer: "PreTrainedTokenizerBase") -> "Labeler":
        """The labeler that this config and tokenizer ask for."""
        from trl.chat_template_utils import has_generation_markers

        has_markers = has_generation_markers(tokenizer.get_chat_template())
        return cls(
            tokenizer,
            config.train_value("max_length"),
            mask="rendered" if config.data.mask == "rendered" or not has_markers else "markers",
            assistant_only=bool(config.train_value("assistant_only_loss")),
            audited=config.audit.gate != "off",
        )

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
        self._backend_sha256 = digest(serialized)
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

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns of `table` that decide what becomes of a row."""
        return (*self.counts, "cut_stops", "cut_answers", "digest", "prompt", "unit")

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that the labels depend on: tokenizer, template, settings and this code."""
        parts = (
            self._backend_sha256,
            str(self.tokenizer.chat_template),
            str(self.tokenizer.special_tokens_map),
            f"{self.max_length} {self.mask} {self.assistant_only} {self.audited}",
            *(inspect.getsource(module) for module in self.code),
            *(version(package) for package in ("transformers", "tokenizers", "jinja2")),
        )
        return digest("\0".join(map(digest, parts)))

    def label(self, given: Iterable["str | Mapping[str, Any]"], format_name: str = "messages") -> list[LabeledRow]:
        """Rows of a source (JSON texts or columns), labelled and audited, in their order."""
        # The tokenizer's Rust code runs without the interpreter's lock: it encodes rows while others are rendered or audited.
        with ThreadPoolExecutor(1) as pool:
            waiting, parts = iter(given), []
            while some := [self._rendered(row, format_name) for row in islice(waiting, _ENCODED_AT_ONCE)]:
                parts.append((some, pool.submit(self._encode, some)))
            for some, encoded in parts:
                self.take(some, encoded.result())
        return [row for some, _ in parts for row in some]

    def __call__(self, batch: Mapping[str, list[Any]], settings: Sequence[Any] = ()) -> "pa.Table":
        """`table` for a batch of columns; `settings` are its other arguments."""
        given = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return self.table(given, *settings)

    def table(
        self,
        given: Iterable[Mapping[str, Any]],
        format_name: str = "messages",
        group_by: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> "pa.Table":
        """What is kept of each row of a source: ids and labels, counts, hashes, why it dropped out, what the audit found.

        `group_by` and `format_name` mean the names after `columns` have been renamed.
        """
        import pyarrow as pa

        read = [renamed(sources.content(row), columns or {}) for row in given]
        with _one_at_a_time:
            is_collecting = gc.isenabled()
            gc.disable()  # it would go over every list of tokens again and again (a quarter of the time), and finds no cycles
            try:
                rows = self.label(read, format_name)
            finally:
                if is_collecting:
                    gc.enable()
        packed = [[array("i", ids).tobytes() for ids in row.lists] for row in rows]
        prompts = [_hash(row.parsed.prompt.encode()) if row.parsed else 0 for row in rows]
        audits = [row.audit or RowAudit([], [], 0, 0) for row in rows]
        return pa.table(
            {
                **{name: _lists([lists[at] for lists in packed]) for at, name in enumerate(self.columns)},
                **{name: [getattr(row, name) for row in rows] for name in self.counts},
                "cut_stops": [audit.cut_stops for audit in audits],
                "cut_answers": [audit.cut_answers for audit in audits],
                "digest": [_hash(self.between.join(lists)) for lists in packed],
                "prompt": prompts,
                "unit": [_unit(*of, group_by) for of in zip(read, prompts, strict=True)],
                "reason": [row.reason for row in rows],
                "detail": [one_line(row.detail) for row in rows],
                "findings": [json.dumps([f.as_json() for f in a.findings]) if a.findings else "" for a in audits],
            }
        )

    def _rendered(self, given: "str | Mapping[str, Any]", format_name: str) -> LabeledRow:
        """A row as text, with what is supervised in it; not encoded yet."""
        try:
            row = self.read(given, format_name)
            for side in row.sides.values():
                side.text.encode()
            return row
        except BadRowError as error:
            return self.row(reason=error.reason, detail=error.detail)
        except TemplateRefusedError as error:
            return self.row(reason=REFUSED, detail=error.problem)
        except UnicodeEncodeError:
            return self.row(reason="not text", detail="the row holds a lone surrogate, which is no character")

    def read(self, given: "str | Mapping[str, Any]", format_name: str) -> LabeledRow:
        """A row as text. Raises `BadRowError` and `TemplateRefusedError`."""
        parsed = conversation(given, format_name)
        refuse_special_tokens(parsed, self.special)
        if parsed.text is None:
            return self._rendered_turns(parsed)
        row = LabeledRow(parsed, parsed.text + self.document_end)
        row.spans = [(0, len(row.text))]
        return row

    def refuse_many_turns(self, messages: Sequence[Any]) -> None:
        """Raises `BadRowError` for a conversation that the oracle would take seconds for."""
        if self.oracle is not None and len(messages) > MOST_MESSAGES:
            detail = f"{len(messages):,} messages; at most {MOST_MESSAGES} are audited: split the conversation"
            raise BadRowError(TOO_MANY_TURNS, detail)

    def _rendered_turns(self, parsed: Conversation) -> LabeledRow:
        messages, tools = parsed.messages, parsed.tools
        self.refuse_many_turns(messages)
        if self.mask == "markers":
            row = LabeledRow(parsed, *self.renderer.marked(messages, tools))
        else:
            row = LabeledRow(parsed, self.renderer.text(messages, tools))
        if self.oracle is not None:
            try:
                row.turns = self.oracle.turns(messages, tools, row.text)
            except TemplateRefusedError as error:
                raise BadRowError(REFUSED, f"the prompt of an answer: {error.problem}") from None
        if self.mask == "rendered":
            row.spans = [(turn.start, turn.end) for turn in row.turns]
        return row

    def pieces(self, row: LabeledRow) -> list[tuple[str, bool]]:
        """What of a row is tokenized by itself, and whether it is supervised."""
        return [piece for piece in cut(row.text, row.spans) if piece[0]]

    def _encode(self, rows: list[LabeledRow]) -> list[list[tuple[list[int], bool]]]:
        """For each row the ids of its pieces, and whether they are supervised."""
        cut_rows = [[] if row.reason else self.pieces(row) for row in rows]
        texts: dict[bool, list[str]] = {True: [], False: []}
        for pieces in cut_rows:
            for text, _ in pieces:
                texts[text.isascii()].append(text)
        encoded = {
            True: iter(self.ascii_backend.encode_batch_fast(texts[True], add_special_tokens=False)),
            False: iter(self.backend.encode_batch_fast(texts[False], add_special_tokens=False)),
        }
        return [[(next(encoded[text.isascii()]).ids, supervised) for text, supervised in pieces] for pieces in cut_rows]

    def trained(self, row: Mapping[str, list[int]]) -> dict[str, tuple[list[int], list[int]]]:
        """Ids and labels of each side, as the loss sees them, from what the trainer gets of a row."""
        return {"": (row["input_ids"], row["labels"])}

    def take(self, rows: Sequence[LabeledRow], encoded: Sequence[list[tuple[list[int], bool]]]) -> None:
        """Give the rows the ids of their pieces, cut at `max_length`, and audit them."""
        for row, pieces in zip(rows, encoded, strict=True):
            if row.reason:
                continue
            for piece, supervised in pieces:
                row.ids += piece
                row.labels += piece if supervised or not self.assistant_only else [IGNORED] * len(piece)
            row.length, everything = len(row.ids), len(row.labels) - row.labels.count(IGNORED)
            row.ids, row.labels = row.ids[: self.max_length], row.labels[: self.max_length]
            row.supervised = len(row.labels) - row.labels.count(IGNORED)
            row.lost = everything - row.supervised
            if not everything and not self.audited:
                row.reason, row.detail = EMPTY_MASK, "nothing is marked as the answer"
            elif everything and not row.supervised:
                row.reason = FULLY_TRUNCATED
                row.detail = f"{row.length} tokens; the answer starts after max_length {self.max_length}"
            if row.reason:
                row.ids, row.labels, row.supervised, row.lost = [], [], 0, 0
        if self.audited and self.oracle is not None:
            kept = [(row, row.parsed) for row in rows if not row.reason and row.parsed and row.parsed.text is None]
            given = [AuditRow(of.messages, row.text, row.turns, row.ids, row.labels) for row, of in kept]
            for (row, _), audit in zip(kept, self.oracle.audit(given), strict=True):
                row.audit = audit


def _hash(content: bytes) -> int:
    """64 bits: among a million rows two that differ have the same with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _unit(row: str | Mapping[str, Any], prompt: int, column: str | None) -> int:
    """What stays together when rows are held out: those of one value in `column`, where the row has it, else of one prompt."""
    value = row.get(column) if column and not isinstance(row, str) else None
    return prompt if value is None else _hash(json.dumps(value, default=str).encode())


def _lists(packed: list[bytes]) -> "pa.Array":
    """Arrow takes over the numbers of each row as they lie in memory, not one by one."""
    import pyarrow as pa

    ends = pa.array(accumulate((len(numbers) // 4 for numbers in packed), initial=0), pa.int32())
    numbers = pa.Array.from_buffers(pa.int32(), ends[-1].as_py(), [None, pa.py_buffer(b"".join(packed))])
    return pa.ListArray.from_arrays(ends, numbers)
