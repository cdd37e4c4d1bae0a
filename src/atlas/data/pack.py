"""Packing by TRL, done before a model is loaded, and checked: what is trained is still exactly the audited rows."""

import hashlib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.compat import dataset_fingerprint
from atlas.data.cache import cached
from atlas.data.stream import BATCH_ROWS, endless
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import SFTConfig


def arrange(rows: "Dataset | IterableDataset", arguments: "SFTConfig") -> "Dataset | IterableDataset":
    """The labelled rows as the trainer takes them: shuffled and packed where the arguments say so.

    SFTTrainer is given prepared rows (`skip_prepare_dataset`), so these two steps of its preparation are taken here, in its
    order. Raises `UserError` where packing would not give back the audited rows.
    """
    from datasets import IterableDataset

    def shuffled(rows: "Dataset") -> "Dataset":
        return rows.shuffle(seed=arguments.seed, keep_in_memory=True) if arguments.shuffle_dataset else rows

    if isinstance(rows, IterableDataset):
        return endless(rows)  # shuffled already, and never packed
    rows = shuffled(rows)
    if not arguments.packing:
        return rows
    length, strategy = arguments.max_length, arguments.packing_strategy
    if length is None:
        raise UserError("train.packing needs train.max_length: it is the length of a pack")

    def make(folder: Path) -> "Dataset":
        from trl import pack_dataset

        return pack_dataset(rows, length, strategy, {"desc": "packs", "cache_file_name": str(folder / "packs.arrow")})

    packed = cached(
        f"{dataset_fingerprint(rows)} {length} {strategy} {version('trl')}", "packs", f"{len(rows):,} rows", make
    )
    view = _tokens if strategy == "wrapped" else _documents  # "wrapped" keeps no boundaries
    if view(rows) != view(packed):
        raise UserError(
            f"train.packing_strategy={strategy}: the packs do not hold the labelled rows as they were audited "
            f"({len(rows):,} rows, {len(packed):,} packs): choose train.packing_strategy=bfd, or train.packing=false"
        )
    return shuffled(packed)


def _documents(dataset: "Dataset") -> object:
    """How often each document (ids and labels) stands in the dataset, packed or not."""
    counts: Counter[bytes] = Counter()
    for batch in dataset.with_format("numpy").iter(BATCH_ROWS):
        lengths = batch.get("seq_lengths", [[len(ids)] for ids in batch["input_ids"]])
        for ids, labels, parts in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            at = 0
            for length in parts:
                end = at + int(length)
                counts[hashlib.sha256(ids[at:end].tobytes() + labels[at:end].tobytes()).digest()] += 1
                at = end
    return counts


def _tokens(dataset: "Dataset") -> object:
    """sha256 over the stream of (id, label) pairs, without boundaries."""
    import numpy as np

    digest = hashlib.sha256()
    for batch in dataset.with_format("numpy").iter(BATCH_ROWS):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            digest.update(np.stack([ids, labels], axis=1).tobytes())
    return digest.digest()
