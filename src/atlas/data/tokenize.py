"""Conversations to `input_ids` and `labels`, in batches, with a ledger of every row that fell out or was cut.

The labels are what the chat template's generation markers say. The text is cut into pieces at the markers and each piece
is tokenized by itself, so that no token straddles the boundary between prompt and answer: for an answer that starts with a
newline Qwen2.5 would merge `\\n` + `\\n` into one token, which at inference, where the prompt ends with its own `\\n`, can
never be generated.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atlas.config import Config
from atlas.data import formats, mixture
from atlas.data.formats import BadRowError, conversation
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy skips
BATCH_ROWS = 1000
_EXAMPLES = 3  # rows shown per reason
EMPTY_MASK = "empty mask"
FULLY_TRUNCATED = "fully truncated"


class Labeler:
    """Callable for `Dataset.map(batched=True)`: rows in, `input_ids`, `labels` and what became of each row out."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int | None, assistant_only: bool) -> None:
        self.tokenizer = tokenizer
        self.backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.max_length = max_length
        self.assistant_only = assistant_only

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the labels depend on: tokenizer, template, settings and this code."""
        digest = hashlib.sha256()
        code = "".join(inspect.getsource(module) for module in (formats, mixture, inspect.getmodule(Labeler)) if module)
        for part in (
            self.backend.to_str(),
            str(self.tokenizer.chat_template),
            str(self.tokenizer.special_tokens_map),
            f"{self.max_length} {self.assistant_only}",
            code,
        ):
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()

    def pieces(self, row: "str | Mapping[str, Any]") -> list[tuple[str, bool]]:
        """The rendered row as (text, is supervised) pieces, in order; raises `BadRowError`."""
        from jinja2 import TemplateError

        from atlas.models.base import render

        parsed = conversation(row)
        try:
            text, spans = render(self.tokenizer, parsed.messages, parsed.tools)
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRowError("refused by the template", f"{type(error).__name__}: {error}") from None
        pieces, at = [], 0
        for start, end in spans:
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
        pieces.append((text[at:], False))
        return [piece for piece in pieces if piece[0]]

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows: list[list[tuple[str, bool]]] = []
        problems: list[tuple[str, str]] = []
        for given in _rows(batch):
            try:
                rows.append(self.pieces(given))
                problems.append(("", ""))
            except BadRowError as error:
                rows.append([])
                problems.append((error.reason, error.detail))
        encoded = iter(
            self.backend.encode_batch_fast([text for row in rows for text, _ in row], add_special_tokens=False)
        )
        out: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "labels", "length", "supervised", "reason", "detail")
        }
        for row, (reason, detail) in zip(rows, problems, strict=True):
            ids: list[int] = []
            labels: list[int] = []
            for _, supervised in row:
                piece = next(encoded).ids
                ids += piece
                labels += piece if supervised or not self.assistant_only else [IGNORED] * len(piece)
            length, supervised_tokens = len(ids), len(labels) - labels.count(IGNORED)
            if not reason and not supervised_tokens:
                reason, detail = EMPTY_MASK, "the template's generation markers enclose nothing"
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            if not reason and labels.count(IGNORED) == len(labels):
                reason, detail = (
                    FULLY_TRUNCATED,
                    f"{length} tokens; the answer starts after max_length {self.max_length}",
                )
            if reason:
                ids, labels = [], []
            for name, value in zip(out, (ids, labels, length, supervised_tokens, reason, detail), strict=True):
                out[name].append(value)
        return out


def _rows(batch: Mapping[str, list[Any]]) -> Iterator["str | Mapping[str, Any]"]:
    if "json" in batch and "line" in batch:
        yield from batch["json"]
        return
    for index in range(len(next(iter(batch.values())))):
        yield {name: column[index] for name, column in batch.items()}


@dataclass
class SourceLedger:
    """What became of the rows of one source. `dropped` and `examples` are keyed by reason; an example is (place, detail)."""

    name: str
    rows: int
    used: int = 0
    cut: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lost_supervised_tokens: int = 0
    """Supervised tokens that `max_length` cut off from rows that are used."""
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def table(self) -> str:
        share = self.supervised_tokens / max(self.tokens, 1)
        lines = [
            f"data {self.name}: {self.rows:,} rows read, {self.used:,} used, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised ({share:.0%})"
        ]
        if self.cut:
            lines.append(
                f"  cut at max_length      {self.cut:>6}  ({self.lost_supervised_tokens:,} supervised tokens lost)"
            )
        for reason, count in sorted(self.dropped.items()):
            place, detail = self.examples[reason][0]
            lines.append(f"  dropped: {reason:<13} {count:>6}  first: {place}: {detail}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Labeled:
    """Rows ready for SFTTrainer (columns `input_ids`, `labels`), their ledgers, and a fingerprint of ids and labels."""

    dataset: "Dataset"
    ledgers: tuple[SourceLedger, ...]
    fingerprint: str

    @property
    def supervised_tokens(self) -> int:
        return sum(ledger.supervised_tokens for ledger in self.ledgers)

    @property
    def tokens(self) -> int:
        return sum(ledger.tokens for ledger in self.ledgers)


def labeler_for(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeler:
    # Packing splits or drops what is too long by its own rules, so the row is cut here first in either case.
    return Labeler(tokenizer, config.train_value("max_length"), bool(config.train_value("assistant_only_loss")))


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeled:
    """Load every source of `data.train` and label it; cached by content, so a second run starts at once.

    Raises `UserError` for a source that cannot be read, for a share of bad rows above `data.max_bad_fraction`, and for any
    row in which the template marks nothing.
    """
    from datasets import concatenate_datasets

    labeler = labeler_for(config, tokenizer)
    parts, ledgers = [], []
    for source in config.data.train:
        rows = mixture.load_source(source, config.data.seed)
        fingerprint = hashlib.sha256(f"{rows._fingerprint} {labeler.fingerprint}".encode()).hexdigest()[:32]
        labeled = rows.map(
            labeler,
            batched=True,
            batch_size=BATCH_ROWS,
            remove_columns=rows.column_names,
            new_fingerprint=fingerprint,
            num_proc=config.data.num_proc,
            features=_features(),
            desc="labels",
        )
        kept, ledger = _account(source.name, rows, labeled, labeler.max_length)
        _refuse_if_bad(ledger, config.data.max_bad_fraction)
        parts.append(kept)
        ledgers.append(ledger)
    dataset = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return Labeled(dataset, tuple(ledgers), stream_sha256(dataset))


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        input_ids=List(Value("int32")),
        labels=List(Value("int32")),
        length=Value("int32"),
        supervised=Value("int32"),
        reason=Value("string"),
        detail=Value("string"),
    )


def _account(name: str, rows: "Dataset", labeled: "Dataset", max_length: int | None) -> tuple["Dataset", SourceLedger]:
    ledger = SourceLedger(name, len(rows))
    kept: list[int] = []
    at = 0
    for batch in labeled.with_format("numpy").iter(BATCH_ROWS):
        for offset, reason in enumerate(batch["reason"]):
            if reason:
                ledger.dropped[reason] = ledger.dropped.get(reason, 0) + 1
                examples = ledger.examples.setdefault(str(reason), [])
                if len(examples) < _EXAMPLES:
                    examples.append((_place(rows, at + offset, name), str(batch["detail"][offset])))
                continue
            kept.append(at + offset)
            supervised = int((batch["labels"][offset] != IGNORED).sum())
            ledger.tokens += len(batch["input_ids"][offset])
            ledger.supervised_tokens += supervised
            if max_length is not None and batch["length"][offset] > max_length:
                ledger.cut += 1
                ledger.lost_supervised_tokens += int(batch["supervised"][offset]) - supervised
        at += len(batch["reason"])
    ledger.used = len(kept)
    whole = labeled if len(kept) == len(labeled) else labeled.select(kept)
    return whole.select_columns(["input_ids", "labels"]), ledger


def _place(rows: "Dataset", index: int, name: str) -> str:
    return f"{name} line {rows[index]['line']}" if "line" in rows.column_names else f"{name} row {index}"


def _refuse_if_bad(ledger: SourceLedger, limit: float) -> None:
    if EMPTY_MASK in ledger.dropped:
        place, detail = ledger.examples[EMPTY_MASK][0]
        raise UserError(
            f"{place}: the loss mask is empty ({detail}): {ledger.dropped[EMPTY_MASK]} rows would train nothing"
        )
    bad = ledger.rows - ledger.used
    if bad <= limit * ledger.rows and ledger.used:
        return
    reasons = "\n".join(
        f"  {reason}: {count}\n" + "\n".join(f"    {place}: {detail}" for place, detail in ledger.examples[reason])
        for reason, count in sorted(ledger.dropped.items(), key=lambda item: -item[1])
    )
    remedy = "mend the rows, or allow them with data.max_bad_fraction"
    if FULLY_TRUNCATED in ledger.dropped:
        remedy = "raise train.max_length, or " + remedy
    raise UserError(
        f"data.train: {bad} of {ledger.rows} rows of {ledger.name} cannot be trained on "
        f"({bad / ledger.rows:.1%}; data.max_bad_fraction allows {limit:.1%}):\n{reasons}\n  {remedy}"
    )


def stream_sha256(dataset: "Dataset") -> str:
    """sha256 over all ids and labels in order: two runs with equal values train on the same tokens with the same mask."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("numpy").iter(BATCH_ROWS):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.astype("<i4").tobytes())
            digest.update(labels.astype("<i4").tobytes())
    return digest.hexdigest()
