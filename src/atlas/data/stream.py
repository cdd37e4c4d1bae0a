"""Rows that are labelled and audited while they are trained on, for data that do not fit on the disk."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.audit.gate import complaints
from atlas.audit.spans import NOTES
from atlas.config import Config, Source
from atlas.data.formats import detect, renamed
from atlas.data.labeled import Labeled, Shown
from atlas.data.ledger import SHARED_PROMPT, STREAMED, SourceLedger, percentiles
from atlas.data.sources import data_files, stream_source
from atlas.data.tokenize import Labeler
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH_ROWS = 1000  # labelled at once
DETECT_ROWS = 100  # tell the format
SHUFFLE_ROWS = 10_000  # rows held in memory, of which the next one is drawn

Row = tuple[str, Any]
"""Place and source row."""


def stream(config: Config, labeler: Labeler, held_out: frozenset[int]) -> Labeled:
    """The sources of `data.train` as a stream of labelled rows, without those whose prompt's digest is in `held_out`.

    The first 1,000 rows of each source are labelled here, before a model is loaded, and judged like a whole data set. Later
    rows are judged batch by batch: the first that the audit finds fault with, or too large a share of bad rows, stops the run.
    """
    data = config.data
    mixed = len(data.train) > 1
    if mixed and not all(source.weight or source.rows for source in data.train):
        raise UserError(
            "data.train: streaming several sources needs a weight (or rows) for each, since it cannot know how long they are"
        )
    streams = [_Stream(source, labeler, config, held_out) for source in data.train]
    heads = [each.head() for each in streams]
    ranked = sorted((row for rows, _ in heads for row in rows), key=itemgetter(0))
    ledgers = tuple(each.ledger for each in streams)
    known = [labeler.fingerprint, str(data.seed), *(_identity(source) for source in data.train)]
    taken = _Taken(ledgers)
    return Streamed(
        taken=taken,
        dataset=_mixed([_dataset(each, number) for number, each in enumerate(streams)], config).map(
            taken, remove_columns=["facts"], features=_features()
        ),
        ledgers=ledgers,
        fingerprint=hashlib.sha256("\n".join(known).encode()).hexdigest(),
        lengths=percentiles(np.array([length for _, lengths in heads for length in lengths])),
        labeler=labeler,
        shown=tuple(row for _, row in ranked[: config.audit.rows]),
        previews=tuple(each.preview for each in streams),
        digests=np.zeros(0, np.int64),
    )


class _Taken:
    """Counts a stream's rows as they leave the shuffle buffer, which holds many more than are trained on."""

    def __init__(self, ledgers: Sequence[SourceLedger]) -> None:
        self.ledgers, self.last = ledgers, deque[tuple[int, list[int]]](maxlen=SHUFFLE_ROWS)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        source, *facts = row["facts"]
        self.ledgers[source].take(facts)
        self.last.append((source, facts))
        return row


@dataclass(frozen=True, kw_only=True)
class Streamed(Labeled):
    """Labelled rows that are read while they are trained on."""

    taken: _Taken

    def took(self, rows: int) -> None:
        while self.taken.last and sum(ledger.used for ledger in self.ledgers) > rows:
            source, facts = self.taken.last.pop()
            self.ledgers[source].take(facts, -1)


class _Stream:
    """One source: callable for the rows that are trained on, with a ledger that grows while they are read."""

    def __init__(self, source: Source, labeler: Labeler, config: Config, held_out: frozenset[int]) -> None:
        self.source, self.labeler, self.config, self.held_out = source, labeler, config, held_out
        self.ledger = self.preview = SourceLedger(source.name, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Stream":
        return self  # interleave_datasets copies its parts, and their ledgers would count unseen

    def head(self) -> tuple[list[tuple[int, Shown]], list[int]]:
        """Judge the first rows: some of them for the audit's record, with a rank (0 failing, 1 with a note, 2), and the tokens of
        all."""
        rows = list(islice(stream_source(self.source), BATCH_ROWS))
        if not rows:
            raise UserError(f"data: {self.source.name} holds no rows")
        first = [row for _, row in rows[:DETECT_ROWS]]
        self.ledger.format = detect(first, self.source.name, self.source.columns, self.source.format)
        rows = list(self._renamed(rows))
        preview = self.preview = SourceLedger(self.source.name, 0, self.ledger.format)
        used = list(self._labelled(rows, preview))
        for _, _, facts in used:
            preview.take([*facts, 0])
        preview.refuse_if_bad(self.config.data.max_bad_fraction)
        self.ledger.findings, self.ledger.finding_examples = preview.findings, preview.finding_examples  # for the gate
        ranks: dict[str, int] = {}
        for place, finding in preview.finding_examples:
            ranks[place] = min(ranks.get(place, 2), int(finding["kind"] in NOTES))
        ranked = sorted((ranks.get(rows[index][0], 2), index) for index, _, _ in used)[: self.config.audit.rows]
        shown = [(rank, Shown(*rows[index], self.ledger.format, None)) for rank, index in ranked]
        return shown, [facts[0] for _, _, facts in used]

    def rows(self, number: int) -> Iterator[dict[str, list[int]]]:
        rows = self._renamed(stream_source(self.source))
        if self.source.rows is not None:
            rows = islice(rows, self.source.rows)
        again = self.ledger.rows > 0
        self.ledger.findings, self.ledger.finding_examples = {}, []
        while batch := list(islice(rows, BATCH_ROWS)):
            for _, row, facts in self._labelled(batch, self.ledger):
                yield row | {"facts": [number, *facts, int(again)]}
            if self.ledger.rows >= BATCH_ROWS:  # of fewer, one bad row may be a large share
                self.ledger.refuse_if_bad(self.config.data.max_bad_fraction)
            if self.config.audit.gate == "error" and (complaint := complaints([self.ledger])):
                raise UserError(complaint)

    def _renamed(self, rows: Iterable[Row]) -> Iterator[Row]:
        return ((place, renamed(row, self.source.columns)) for place, row in rows)

    def _labelled(
        self, batch: list[Row], ledger: SourceLedger
    ) -> Iterable[tuple[int, dict[str, list[int]], list[int]]]:
        """(number in the batch, ids and labels, `STREAMED` numbers) of the rows that can be trained on; the others are counted."""
        columns = self.labeler.columns([row for _, row in batch], ledger.format)
        ledger.rows += len(batch)
        good = []
        for index, reason in enumerate(columns["reason"]):
            place = batch[index][0]
            if reason:
                ledger.drop(reason, place, columns["detail"][index])
                continue
            if columns["findings"][index]:
                ledger.add_findings(json.loads(columns["findings"][index]), place)
            if columns["prompt"][index] in self.held_out:
                ledger.set_aside[SHARED_PROMPT] = ledger.set_aside.get(SHARED_PROMPT, 0) + 1
                continue
            row = {"input_ids": columns["input_ids"][index], "labels": columns["labels"][index]}
            good.append((index, row, [columns[name][index] for name in STREAMED]))
        return good


def _features(*more: str) -> Any:
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in ("input_ids", "labels", *more)})


def _dataset(rows: _Stream, number: int) -> "IterableDataset":
    from datasets import IterableDataset

    return IterableDataset.from_generator(rows.rows, _features("facts"), gen_kwargs={"number": number})


def _mixed(datasets: list["IterableDataset"], config: Config) -> "IterableDataset":
    from datasets import interleave_datasets

    data = config.data
    rows = datasets[0]
    if len(datasets) > 1:
        parts = [source.weight or source.rows or 1 for source in data.train]
        rows = interleave_datasets(
            datasets,
            probabilities=[part / sum(parts) for part in parts],
            seed=data.seed,
            stopping_strategy="first_exhausted" if data.train[0].weight else "all_exhausted_without_replacement",
        )
    return rows.shuffle(seed=data.seed, buffer_size=SHUFFLE_ROWS)


def endless(rows: "IterableDataset") -> "IterableDataset":
    """Pass after pass, each in another order, as one stream. The trainer then counts its batches from the start, and a resumed run
    skips as many; where a pass ends, which nobody knows beforehand, no batch is cut short."""
    from datasets import IterableDataset

    def passes() -> Iterator[Any]:
        for number in count():
            rows.set_epoch(number)
            found = False
            for row in rows:
                found = True
                yield row
            if not found:
                raise UserError("data.train: nothing is left of the stream to train on")

    return IterableDataset.from_generator(passes, features=rows.features)


def _identity(source: Source) -> str:
    """What the stream's rows depend on: the content of local files, name and revision of others."""
    given = source.model_dump_json(exclude={"name"})
    if not source.is_local:
        return f"{source.name} {given}"
    digest = hashlib.sha256(given.encode())
    for path in data_files(Path(source.name).expanduser()):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
