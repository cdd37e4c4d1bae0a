"""The labelled rows of a config: what a phase trains on, and all that is known of it."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atlas.auditing.spans import NOTES, Finding, tokenizer_findings
from atlas.config import Source
from atlas.data import sources
from atlas.data.formats import renamed
from atlas.data.ledger import EXAMPLES, HeldOut, SourceLedger
from atlas.data.mixture import first_occurrences
from atlas.data.tokenize import Labeler
from atlas.launch import processes

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class Shown(NamedTuple):
    """A source row for the audit's record."""

    place: str
    row: Any
    format: str
    number: int | None
    """Its number in the dataset; None where it is not there: streamed, held out or set aside."""


class Part:
    """One source, labelled. In memory are a few numbers of each row; rows, ids and labels stay on the disk."""

    def __init__(
        self, source: Source, rows: Sequence[Any], labeled: "Dataset", format_name: str, labeler: Labeler
    ) -> None:
        self.name, self.columns, self.rows, self.labeled = source.name, source.columns, rows, labeled
        self.labeler = labeler
        self.wanted = 0
        """How many rows it has to give, where that is asked for: more than there are repeat."""
        known = labeled.select_columns([*labeler.numbers, "reason", "detail", "findings"]).with_format("arrow")[:]
        self.numbers = {name: known[name].to_numpy() for name in labeler.numbers}
        self.ledger = labeler.ledger(source.name, format=format_name)
        self.good, self.kinds = self.ledger.judge(known, self.place)
        """The rows to train on, and those in which the audit found something, by its kind."""

    def place(self, index: int) -> str:
        return sources.place(self.rows[index], self.name, index)

    def of(self, column: str) -> np.ndarray:
        """A column's values of the rows in `good`."""
        return self.numbers[column][self.good]

    def keep(self, mask: np.ndarray, reason: str) -> None:
        """Set aside the good rows that are not in `mask`."""
        self.ledger.set_apart(reason, int((~mask).sum()))
        self.good = self.good[mask]

    def settle(self, max_length: int | None) -> None:
        """Count what is used."""
        used = {name: values[self.good] for name, values in self.numbers.items()}
        numbers = self.ledger.counted(used, ~first_occurrences(self.good))
        self.ledger.add({name: values.sum() for name, values in numbers.items()})
        self.ledger.count_lengths(used["length"], used["supervised"], max_length)


@dataclass(frozen=True)
class Labeled:
    """Rows, ready for a trainer, and what became of each.

    Their columns are `input_ids` and `labels`; of pairs `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """

    dataset: "Dataset | IterableDataset"
    """What is trained on, in this order."""
    ledgers: tuple[SourceLedger, ...]
    """One for each source."""
    fingerprint: str
    """SHA-256 of all ids and labels."""
    lengths: dict[str, int]
    """Percentiles of the rows' tokens before truncation."""
    labeler: Labeler
    shown: tuple[Shown, ...]
    """For the record: rows that the audit found fault with, some with a note, some that were cut, the first `audit.rows`."""
    digests: np.ndarray
    """A 64-bit hash of each row's ids and labels, in the dataset's order; empty where rows are streamed."""
    tokens_of_rows: np.ndarray
    """Of each row as it is trained, in the dataset's order; of a stream's first rows. Of a pair: its prompt and longer answer."""
    read_of_rows: np.ndarray
    """The same, as the model reads them: of a pair its prompt twice, and both answers."""
    eval_dataset: "Dataset | None" = None
    """Held-out rows; None where the config has none."""
    eval_ledgers: tuple[SourceLedger, ...] = ()
    """Of the sources of `data.eval`."""
    held_out: HeldOut | None = None
    previews: tuple[SourceLedger, ...] = ()
    """Of the first rows of each streamed source, which are judged before the others are read."""
    fetched: deque[tuple[int, dict[str, int]]] = field(default_factory=deque)
    """Of a stream's last rows: the number of the source, and what the row has added to its ledger."""

    def took(self, rows: int) -> None:
        """This process has trained on so many rows: what a stream has fetched beyond them is not counted as used. Then the ledgers
        are those of all processes, which have to call this together."""
        while self.fetched and sum(ledger.used for ledger in self.ledgers) > rows:
            source, numbers = self.fetched.pop()
            self.ledgers[source].add(numbers, -1)
        if self.previews and processes() > 1:
            from accelerate.utils import gather_object

            for ledger, parts in zip(self.ledgers, zip(*gather_object([self.ledgers]), strict=True), strict=True):
                ledger.sum_up(parts)

    @property
    def is_read(self) -> bool:
        """False for a stream of which only the first rows have been read."""
        return not self.previews or any(ledger.rows for ledger in self.ledgers)

    @property
    def known(self) -> tuple[SourceLedger, ...]:
        """What is known of each source: of all its rows, or of a stream's first ones."""
        return self.ledgers if self.is_read else self.previews

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
        """Tokens that the loss falls on, in all rows."""
        return sum(ledger.supervised_tokens for ledger in self.ledgers)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(ledger.tokens for ledger in self.ledgers)

    def table(self) -> str:
        """The ledgers of all sources as text."""
        lines = [] if self.is_read else ["data are read while training; the first rows of each source:"]
        lines += [ledger.table() for ledger in (*self.known, *self.eval_ledgers)]
        if self.mask == "all tokens":
            lines.append("LOSS ON ALL TOKENS, prompts too, and nothing is audited: train.assistant_only_loss is false")
        return "\n".join([*lines, self.held_out.line()] if self.held_out else lines)


def all_good(parts: Sequence[Part]) -> np.ndarray:
    """The numbers of the rows to train on, in the rows of all parts, one part after the other."""
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    return np.concatenate([part.good + start for part, start in zip(parts, starts[:-1], strict=True)])


def shown(parts: Sequence[Part], eval_parts: Sequence[Part], rows: np.ndarray, count: int) -> Iterator[Shown]:
    """Rows for the audit's record, each once: `count` that failed, `count` with a note (a few of each kind), half as many that were
    cut, and the first `count`.

    `rows`: the rows of the dataset in their order, numbered as in `all_good`.
    """
    everything = (*parts, *eval_parts)
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])

    def of_dataset(numbers: np.ndarray) -> list[tuple[Part, int]]:
        which = np.searchsorted(starts, rows[numbers], side="right") - 1
        return [(parts[at], int(row - starts[at])) for at, row in zip(which, rows[numbers], strict=True)]

    failing = [(part, row) for part in everything for kind in part.kinds.keys() - NOTES for row in part.kinds[kind]]
    of_kinds = [[(part, row) for row in part.kinds.get(kind, [])[:EXAMPLES]] for part in everything for kind in NOTES]
    noted = [one for few in zip_longest(*of_kinds) for one in few if one]
    cut = np.flatnonzero(np.concatenate([part.numbers["lost"] for part in parts])[rows])[: (count + 1) // 2]
    first = of_dataset(np.arange(min(count, len(rows))))
    for part, row in dict.fromkeys(
        [*list(dict.fromkeys(failing))[:count], *list(dict.fromkeys(noted))[:count], *of_dataset(cut), *first]
    ):
        at = np.flatnonzero(rows == starts[parts.index(part)] + row) if part in parts else np.zeros(0, int)
        given = renamed(sources.content(part.rows[row]), part.columns)
        yield Shown(part.place(row), given, part.ledger.format, int(at[0]) if len(at) else None)
