"""Which rows stand in one micro-batch, how much of it is padding, and what training on it costs.

Three ways to put rows into micro-batches of so many rows:

    pad     in random order; each row is filled up to the longest of its micro-batch
    pack    the same rows one after the other in one row, without padding; attention sees each by itself
    group   rows of similar length together, in random order of the micro-batches; filled up like pad
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

PAD, PACK, GROUP = "pad", "pack", "group"


class LengthGroups:
    """A sampler: the numbers of all rows, each once, so that every micro-batch has rows of similar length.

    Each epoch has an order of its own, drawn from seed and epoch alone, so that a resumed run has the same one. transformers' own
    sampler draws from the global random state, and groups nothing where there are fewer than 8 micro-batches.
    """

    def __init__(self, lengths: np.ndarray, rows: int, processes: int, seed: int) -> None:
        """`lengths`: tokens of each row. `rows`: of a micro-batch. accelerate gives micro-batch i to process i mod
        `processes`: those that run at the same time are of similar length too."""
        self.lengths, self.rows, self.processes, self.seed, self.epoch = lengths, rows, processes, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> np.ndarray:
        """The numbers of the rows in this epoch's order. Rows that do not fill a group stand at the end."""
        random = np.random.default_rng([self.seed, self.epoch])
        count, size = len(self.lengths), self.rows * self.processes
        rows = random.permutation(count)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        # Each row may move by half a group, of many rows by a 128th of them, so that it does not meet the same ones each time.
        width = max(size / 2, count / 128)
        rows = rows[np.argsort(np.arange(count) + random.uniform(-width, width, count))]
        rest = count % size
        start = random.integers(count - rest + 1)
        groups = np.delete(rows, slice(start, start + rest)).reshape(-1, size)
        return np.concatenate([random.permutation(groups).ravel(), rows[start : start + rest]])


class Filled:
    """A sampler: the numbers of another one, then those of the rows at the dataset's end that only fill up."""

    def __init__(self, sampler: Any, fillers: int) -> None:
        self.sampler, self.fillers = sampler, fillers

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) + self.fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(len(self.sampler), len(self))


def filled(rows: "Dataset", multiple: int, empty: Callable[[Any], dict[str, Any]]) -> tuple["Dataset", int]:
    """The rows, and behind them as many rows without a supervised token as make their number a multiple; how many those are.

    With several processes each has to get as many micro-batches as the others. accelerate would repeat rows from the start, which
    would then count twice. `empty` makes such a row from one of the dataset's.
    """
    from datasets import Dataset, concatenate_datasets

    if not (count := -len(rows) % multiple):
        return rows, 0
    return concatenate_datasets([rows, Dataset.from_list([empty(rows[0])] * count, features=rows.features)]), count


@dataclass(frozen=True)
class Work:
    """What a model spends on a micro-batch, in units of one token's linear layers, forward and backward."""

    pair: float = 0.0
    """Of two positions of one row in attention."""
    each: float = 0.0
    """Of a micro-batch, however short."""
    by_row: bool = False
    """Attention takes each row of a pack by itself; else it looks at all pairs of its positions."""
    flash: bool = False
    """Flash attention also skips padding."""

    def of(self, way: str, lengths: np.ndarray, rows: int) -> float:
        """Of an epoch in this order. `rows`: of a micro-batch."""
        starts = np.arange(0, len(lengths), rows)
        lengths = lengths.astype(np.int64)
        totals, squares = np.add.reduceat(lengths, starts), np.square(lengths).sum() / 2
        if way == PACK:
            tokens, pairs = totals.sum(), squares if self.by_row else np.square(totals).sum()
        else:
            held, longest = _held(lengths, rows), _longest(lengths, rows)
            # Without padding there is no mask, and half of the pairs.
            each = held * longest**2 / np.where(held * longest == totals, 2, 1)
            tokens, pairs = padded(lengths, rows), squares if self.flash else each.sum()
        return float(tokens + self.pair * pairs + self.each * len(starts))


def padded(lengths: np.ndarray, rows: int, multiple: int = 1, packed: bool = False) -> int:
    """Tokens of an epoch in this order, with what its micro-batches of so many rows are filled up with: to their longest row, and
    that to a multiple; packs only to the multiple."""
    if packed:
        lengths, rows = np.add.reduceat(lengths.astype(np.int64), np.arange(0, len(lengths), rows)), 1
    wide = -(-_longest(lengths, rows) // multiple) * multiple
    return int((_held(lengths, rows) * wide).sum())


def _longest(lengths: np.ndarray, rows: int) -> np.ndarray:
    return np.maximum.reduceat(lengths.astype(np.int64), np.arange(0, len(lengths), rows))


def _held(lengths: np.ndarray, rows: int) -> np.ndarray:
    """Rows of each micro-batch: the last one may have fewer."""
    return np.diff(np.append(np.arange(0, len(lengths), rows), len(lengths)))
