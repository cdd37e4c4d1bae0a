"""The labelled rows of a config: what a phase trains on, and all that is known of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atlas.audit.spans import Finding, tokenizer_findings
from atlas.data.ledger import HeldOut, SourceLedger
from atlas.data.tokenize import Labeler

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class Shown(NamedTuple):
    """A source row for the audit's record."""

    place: str
    row: Any
    format: str
    number: int | None
    """Its number in the dataset; None: it is streamed, held out or set aside."""


@dataclass(frozen=True)
class Labeled:
    """A phase's rows, ready for its trainer (columns `input_ids`, `labels`), their ledgers, and a fingerprint of ids and labels."""

    dataset: "Dataset | IterableDataset"
    ledgers: tuple[SourceLedger, ...]
    fingerprint: str
    lengths: dict[str, int]
    """Percentiles of the rows' tokens before truncation."""
    labeler: Labeler
    shown: tuple[Shown, ...]
    """For the record: rows that the audit found fault with, some with a note, some that were cut, the first `audit.rows`."""
    digests: np.ndarray
    """A 64-bit hash of each row's ids and labels, in the dataset's order; empty where rows are streamed."""
    eval_dataset: "Dataset | None" = None
    eval_ledgers: tuple[SourceLedger, ...] = ()
    """Of the sources of `data.eval`."""
    held_out: HeldOut | None = None
    previews: tuple[SourceLedger, ...] = ()
    """Of the first rows of each streamed source, which are judged before the others are read."""

    def took(self, rows: int) -> None:
        """The run has trained on so many rows. A stream then counts only those as used, and none that was only fetched."""

    @property
    def mask(self) -> str:
        """Where the labels come from: "markers", "rendered" or "all tokens"."""
        return self.labeler.mask if self.labeler.assistant_only else "all tokens"

    @property
    def audited(self) -> bool:
        return self.labeler.audited

    @cached_property
    def tokenizer_findings(self) -> list[Finding]:
        """The audit's findings that concern the tokenizer, and so all rows."""
        return tokenizer_findings(self.labeler.tokenizer) if self.audited else []

    @property
    def supervised_tokens(self) -> int:
        return sum(ledger.supervised_tokens for ledger in self.ledgers)

    @property
    def tokens(self) -> int:
        return sum(ledger.tokens for ledger in self.ledgers)

    def table(self) -> str:
        """The ledgers of all sources as text."""
        begun = not self.previews or any(ledger.rows for ledger in self.ledgers)
        lines = [] if begun else ["data are read while training; the first rows of each source:"]
        lines += [ledger.table() for ledger in (*(self.ledgers if begun else self.previews), *self.eval_ledgers)]
        if self.mask == "all tokens":
            lines.append("LOSS ON ALL TOKENS, prompts too, and nothing is audited: train.assistant_only_loss is false")
        return "\n".join([*lines, self.held_out.line()] if self.held_out else lines)
