"""Rows that are labelled and audited while they are trained on, for data that do not fit on the disk.

Of several processes each reads all sources, and takes every N-th row of each, from its own number on: no row is taken twice or by
none. It labels, audits, counts and shuffles these alone.
"""

import json
from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.auditing.gate import complaints
from atlas.config import Config, Source
from atlas.data import sources
from atlas.data.labeled import Labeled, Part, all_good, shown
from atlas.data.ledger import SHARED_PROMPT, SourceLedger, percentiles
from atlas.data.tokenize import Labeler
from atlas.errors import UserError
from atlas.files import digest, sha256
from atlas.launch import processes, rank

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH_ROWS = 1000  # labelled at once
SHUFFLE_ROWS = 10_000  # rows held in memory by all processes together, of which the next one is drawn


def stream(config: Config, labeler: Labeler, held_out: np.ndarray) -> Labeled:
    """The sources of `data.train` as a stream of labelled rows, without those whose prompt's digest is in `held_out`.

    The first 1,000 rows of each source are labelled here, before a model is loaded, and judged like a whole data set. Later rows
    are judged batch by batch: the first that the audit finds fault with, or too large a share of bad rows, stops the run.
    """
    data = config.data
    if len(data.train) > 1 and not all(source.weight or source.rows for source in data.train):
        raise UserError(
            "data.train: streaming several sources needs a weight (or rows) for each, since it cannot know how long they are"
        )
    heads = [_head(source, labeler, config, held_out) for source in data.train]
    ledgers = tuple(labeler.ledger(head.name, format=head.ledger.format) for head in heads)
    fetched = deque[tuple[int, dict[str, int]]](maxlen=SHUFFLE_ROWS)

    def used(row: dict[str, Any]) -> dict[str, Any]:
        """Count a row as it leaves the shuffle buffer, which holds many more than are trained on."""
        number, counts = json.loads(row["counted"])
        ledgers[number].add(counts)
        fetched.append((number, counts))
        return row

    parts = [
        _rows(number, source, ledgers[number], labeler, config, held_out) for number, source in enumerate(data.train)
    ]
    known = [labeler.fingerprint, str(data.seed), *(_identity(source) for source in data.train)]
    return Labeled(
        dataset=_mixed(parts, config).map(used, remove_columns=["counted"], features=_features(labeler)),
        ledgers=ledgers,
        fingerprint=digest("\n".join(known)),
        lengths=percentiles(np.concatenate([head.of("length") for head in heads])),
        labeler=labeler,
        shown=tuple(row._replace(number=None) for row in shown(heads, [], all_good(heads), config.audit.rows)),
        previews=tuple(head.ledger for head in heads),
        digests=np.zeros(0, np.int64),
        tokens_of_rows=np.concatenate([head.of("size") for head in heads]),
        read_of_rows=np.concatenate([head.of("tokens") for head in heads]),
        fetched=fetched,
    )


def _head(source: Source, labeler: Labeler, config: Config, held_out: np.ndarray) -> Part:
    """The first rows of a source, judged."""
    from datasets import Dataset

    rows = list(islice(sources.stream_source(source), BATCH_ROWS))
    if not rows:
        raise UserError(f"data: {source.name} holds no rows")
    format_name = sources.format_of(source, rows, labeler.formats)
    head = Part(source, rows, Dataset(labeler.table(rows, format_name, None, source.columns)), format_name, labeler)
    head.keep(~np.isin(head.of("prompt"), held_out), SHARED_PROMPT)
    head.settle(labeler.max_length)
    head.ledger.refuse_if_bad(config.data.max_bad_fraction)
    return head


def _rows(
    number: int, source: Source, ledger: SourceLedger, labeler: Labeler, config: Config, held_out: np.ndarray
) -> "IterableDataset":
    """The labelled rows of one source that this process trains on; its ledger grows while they are read."""
    from datasets import IterableDataset

    def rows() -> Iterator[dict[str, list[int]]]:
        given = enumerate(islice(sources.stream_source(source), source.rows))
        own = islice(given, rank(), None, processes())
        again = ledger.rows > 0
        ledger.findings, ledger.finding_examples = {}, []
        while batch := list(islice(own, BATCH_ROWS)):
            table = labeler.table([row for _, row in batch], ledger.format, None, source.columns)
            places = [sources.place(row, source.name, index) for index, row in batch]
            good, _ = ledger.judge(table, places.__getitem__)
            is_held_out = np.isin(table["prompt"].to_numpy()[good], held_out)
            ledger.set_apart(SHARED_PROMPT, int(is_held_out.sum()))
            table = table.take(good[~is_held_out])
            numbers = {name: table[name].to_numpy() for name in labeler.numbers}
            counts = ledger.counted(numbers, np.full(len(table), again))
            for index, row in enumerate(table.select(labeler.columns).to_pylist()):
                yield row | {"counted": json.dumps([number, {name: int(of[index]) for name, of in counts.items()}])}
            if ledger.rows >= BATCH_ROWS:  # of fewer, one bad row may be a large share
                ledger.refuse_if_bad(config.data.max_bad_fraction)
            if config.audit.gate == "error" and (complaint := complaints([ledger])):
                raise UserError(complaint)

    return IterableDataset.from_generator(rows, _features(labeler, with_counts=True))


def _features(labeler: Labeler, with_counts: bool = False) -> Any:
    from datasets import Features, List, Value

    columns = {name: List(Value("int32")) for name in labeler.columns}
    return Features(columns | {"counted": Value("string")} if with_counts else columns)


def _mixed(parts: list["IterableDataset"], config: Config) -> "IterableDataset":
    from datasets import interleave_datasets

    data = config.data
    rows = parts[0]
    if len(parts) > 1:
        shares = [source.weight or source.rows or 1 for source in data.train]
        rows = interleave_datasets(
            parts,
            probabilities=[share / sum(shares) for share in shares],
            seed=data.seed,
            stopping_strategy="first_exhausted" if data.train[0].weight else "all_exhausted_without_replacement",
        )
    return rows.shuffle(seed=data.seed, buffer_size=max(SHUFFLE_ROWS // processes(), 1))


def endless(rows: "IterableDataset") -> "IterableDataset":
    """The same rows again and again, each pass in another order, as one stream.

    So the trainer counts its batches from the start of the run, and a resumed run skips as many. The length of a pass is not known
    beforehand; without its end in the stream, no batch is shorter than the others. Processes whose parts differ by a row begin
    their next pass at different steps.
    """
    from datasets import IterableDataset

    def passes(shards: list[int]) -> Iterator[Any]:
        for number in count():
            rows.set_epoch(number)
            found = False
            for row in rows:
                found = True
                yield row
            if not found:
                of = f" for process {rank()} of {processes()}: start fewer processes" if processes() > 1 else ""
                raise UserError(f"data.train: nothing is left of the stream to train on{of}")

    # `rows` are those of this process already. accelerate divides a stream by its shards if it has one for each process, otherwise
    # once more by rows.
    return IterableDataset.from_generator(passes, rows.features, {"shards": [*range(processes())]})


def _identity(source: Source) -> str:
    """What the stream's rows depend on: the content of local files, name and revision of others."""
    given = source.model_dump_json(exclude={"name"})
    if not source.is_local:
        return f"{source.name} {given}"
    return " ".join([given, *(sha256(path) for path in sources.data_files(Path(source.name).expanduser()))])
