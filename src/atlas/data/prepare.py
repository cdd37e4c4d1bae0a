"""All sources of a config to one labelled dataset, with a ledger of every row that fell out or was cut, and the audit's gate."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atlas.audit.spans import IGNORED, REMEDIES, Finding, tokenizer_findings
from atlas.config import Config
from atlas.data import mixture
from atlas.data.formats import detect
from atlas.data.tokenize import EMPTY_MASK, FULLY_TRUNCATED, Labeler
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
_DETECT_ROWS = 100
_EXAMPLES = 3  # rows shown per reason and per kind of finding


@dataclass
class SourceLedger:
    """What became of the rows of one source. `dropped` and `examples` are keyed by reason; an example is (place, detail)."""

    name: str
    rows: int
    format: str = "messages"
    repeated: int = 0
    """Rows that stand there again because more were asked for than there are."""
    used: int = 0
    cut: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lost_supervised_tokens: int = 0
    """Supervised tokens that `max_length` cut off from rows that are used."""
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    cut_stops: int = 0
    """Answers whose stop token `max_length` cut off."""
    cut_answers: int = 0
    """Answers of which `max_length` left nothing."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of the used rows' tokens before truncation."""
    findings: dict[str, int] = field(default_factory=dict)
    """Rows per kind of audit finding; (place, finding) of the first ones in `finding_examples`."""
    finding_examples: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add_findings(self, findings: Sequence[dict[str, Any]], place: str) -> None:
        """Count one row's findings, and keep the first few of each kind."""
        for kind in {finding["kind"] for finding in findings}:
            self.findings[kind] = self.findings.get(kind, 0) + 1
        for finding in findings:
            if sum(example["kind"] == finding["kind"] for _, example in self.finding_examples) < _EXAMPLES:
                self.finding_examples.append((place, finding))

    def table(self) -> str:
        share = self.supervised_tokens / max(self.tokens, 1)
        again = f" ({self.repeated:,} of them again)" if self.repeated else ""
        lines = [
            f"data {self.name} ({self.format}): {self.rows:,} rows read{again}, {self.used:,} used, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised ({share:.0%})"
        ]
        if self.cut:
            lines.append(
                f"  cut at max_length      {self.cut:>6}  ({self.lost_supervised_tokens:,} supervised tokens lost; "
                f"{self.cut_stops} answers lost their stop token, {self.cut_answers} of them all they had)"
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
    lengths: dict[str, int]
    """Percentiles of the rows' tokens before truncation."""
    mask: str
    """Where the labels come from: "markers", "rendered" or "all tokens"."""
    audited: bool
    tokenizer_findings: tuple[Finding, ...]
    labeler: Labeler
    first: tuple[tuple[str, Any, str], ...]
    """Place, source row and its format of the first `audit.rows` rows of the dataset, for the record."""

    @property
    def supervised_tokens(self) -> int:
        return sum(ledger.supervised_tokens for ledger in self.ledgers)

    @property
    def tokens(self) -> int:
        return sum(ledger.tokens for ledger in self.ledgers)


def labeler_for(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeler:
    """The labeler that this config and tokenizer ask for."""
    from trl.chat_template_utils import has_generation_markers

    template = tokenizer.get_chat_template()
    return Labeler(
        tokenizer,
        config.train_value("max_length"),
        mask="rendered" if config.data.mask == "rendered" or not has_generation_markers(template) else "markers",
        assistant_only=bool(config.train_value("assistant_only_loss")),
        audited=config.audit.gate != "off",
    )


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeled:
    """Load, label and audit every source of `data.train`; cached by content, so a second run starts at once.

    Raises `UserError` for a source that cannot be read and for a share of bad rows above `data.max_bad_fraction`; what the
    audit found is for `gate` to judge.
    """
    from datasets import concatenate_datasets

    labeler = labeler_for(config, tokenizer)
    parts, ledgers = [], []
    first: list[tuple[str, Any, str]] = []
    lengths: list[int] = []
    labels_of = labeler.fingerprint  # hashes the whole tokenizer: once, not per source
    for source in config.data.train:
        rows, repeated = mixture.load_source(source, config.data.seed)
        format_name = source.format or detect(_raw(rows, range(min(len(rows), _DETECT_ROWS))), source.name)
        known = f"{rows._fingerprint} {labels_of} {format_name}"
        fingerprint = hashlib.sha256(known.encode()).hexdigest()[:32]
        labeled = label_rows(rows, labeler, fingerprint, format_name, config.data.num_proc)
        kept, kept_lengths, ledger = _account(source.name, rows, labeled, labeler.max_length)
        ledger.format, ledger.repeated = format_name, repeated
        _refuse_if_bad(ledger, config.data.max_bad_fraction)
        parts.append(labeled if len(kept) == len(labeled) else labeled.select(kept))
        ledgers.append(ledger)
        lengths += kept_lengths
        shown = kept[: config.audit.rows - len(first)]
        places = [_place(rows, index, source.name) for index in shown]
        first += [(*row, format_name) for row in zip(places, _raw(rows, shown), strict=True)]
    dataset = (concatenate_datasets(parts) if len(parts) > 1 else parts[0]).select_columns(["input_ids", "labels"])
    return Labeled(
        dataset=dataset,
        ledgers=tuple(ledgers),
        fingerprint=stream_sha256(dataset),
        lengths=percentiles(lengths),
        mask=labeler.mask if labeler.assistant_only else "all tokens",
        audited=labeler.audited,
        tokenizer_findings=tuple(tokenizer_findings(tokenizer)) if labeler.audited else (),
        labeler=labeler,
        first=tuple(first),
    )


def _raw(rows: "Dataset", indices: Iterable[int]) -> list[Any]:
    """Rows as the labeler takes them: JSON texts or mappings of columns."""
    return [rows[index]["json"] if mixture.is_json_lines(rows) else rows[index] for index in indices]


def label_rows(
    rows: "Dataset", labeler: Labeler, fingerprint: str, format_name: str = "messages", num_proc: int | None = None
) -> "Dataset":
    """A source's rows with the columns of `_features`, one for one; cached on disk under `fingerprint`."""
    return rows.map(
        labeler,
        fn_kwargs={"format_name": format_name},
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=rows.column_names,
        new_fingerprint=fingerprint,
        num_proc=num_proc,
        features=_features(),
        desc="labels",
    )


def gate(config: Config, labeled: Labeled) -> None:
    """Stop the run (`UserError`) where the audit found what must not be trained; with `audit.gate=warn` only say so."""
    complaint = complaints(labeled)
    if complaint and config.audit.gate == "error":
        raise UserError(
            f"{complaint}\n  `atlas audit` shows the rows token by token; audit.gate=warn trains all the same"
        )
    if complaint:
        print(f"warning (audit.gate={config.audit.gate}): {complaint}")


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        input_ids=List(Value("int32")),
        labels=List(Value("int32")),
        length=Value("int32"),
        supervised=Value("int32"),
        reason=Value("string"),
        detail=Value("string"),
        findings=Value("string"),
        cut_stops=Value("int32"),
        cut_answers=Value("int32"),
    )


def _account(
    name: str, rows: "Dataset", labeled: "Dataset", max_length: int | None
) -> tuple[list[int], list[int], SourceLedger]:
    """The rows that are used, by index, their tokens before truncation, and the ledger."""
    ledger = SourceLedger(name, len(rows))
    kept: list[int] = []
    lengths: list[int] = []
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
            lengths.append(int(batch["length"][offset]))
            supervised = int((batch["labels"][offset] != IGNORED).sum())
            ledger.tokens += len(batch["input_ids"][offset])
            ledger.supervised_tokens += supervised
            if max_length is not None and batch["length"][offset] > max_length:
                ledger.cut += 1
                ledger.lost_supervised_tokens += int(batch["supervised"][offset]) - supervised
                ledger.cut_stops += int(batch["cut_stops"][offset])
                ledger.cut_answers += int(batch["cut_answers"][offset])
            if batch["findings"][offset]:
                ledger.add_findings(json.loads(batch["findings"][offset]), _place(rows, at + offset, name))
        at += len(batch["reason"])
    ledger.used = len(kept)
    ledger.lengths = percentiles(lengths)
    return kept, lengths, ledger


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """p50, p90, p99 and max of `lengths`; empty for none."""
    import numpy as np

    if not lengths:
        return {}
    values = np.percentile(lengths, [50, 90, 99, 100]).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), map(round, values), strict=True))


def complaints(labeled: Labeled) -> str | None:
    """The audit's findings as one message with the first of each kind and the remedy, or None."""
    lines = [f"  stop: {finding.text}\n    remedy: {REMEDIES['stop']}" for finding in labeled.tokenizer_findings]
    for ledger in labeled.ledgers:
        for kind, count in sorted(ledger.findings.items()):
            lines.append(f"  {kind}: {count} rows of {ledger.name}")
            for place, finding in ledger.finding_examples:
                if finding["kind"] == kind:
                    turn = f", message {finding['turn']}" if finding["turn"] >= 0 else ""
                    lines.append(f"    {place}{turn}, bytes {finding['start']}-{finding['end']}: {finding['text']!r}")
            lines.append(f"    remedy: {REMEDIES[kind]}")
    if not lines:
        return None
    return "the audit of the loss mask found what must not be trained:\n" + "\n".join(lines)


def _place(rows: "Dataset", index: int, name: str) -> str:
    if mixture.is_json_lines(rows):
        return f"{rows[index]['file']} line {rows[index]['line']}"
    return f"{name} row {index}"


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
    for row in row_digests(dataset):
        digest.update(row)
    return digest.hexdigest()


def row_digests(dataset: "Dataset") -> Iterator[bytes]:
    """sha256 of each row's ids and labels (int32, little-endian)."""
    for batch in dataset.with_format("numpy").iter(BATCH_ROWS):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            yield hashlib.sha256(ids.astype("<i4").tobytes() + labels.astype("<i4").tobytes()).digest()
