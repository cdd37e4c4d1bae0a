"""Packing by TRL, done before a model is loaded, and checked: what is trained is still exactly the audited rows."""

import hashlib
from collections import Counter
from importlib.metadata import version
from typing import TYPE_CHECKING

from atlas.compat import dataset_fingerprint
from atlas.data.cache import cached
from atlas.data.stream import endless
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import SFTConfig

BATCH_ROWS = 1000


def arrange(rows: "Dataset | IterableDataset", arguments: "SFTConfig") -> "Dataset | IterableDataset":
    """The labelled rows as the trainer takes them: shuffled and packed where the arguments say so.

    SFTTrainer is given prepared rows (`skip_prepare_dataset`), so these two steps of its preparation are taken here, in its
    order. Raises `UserError` where packing would not give back the audited rows.
    """
    from datasets import IterableDataset

    if isinstance(rows, IterableDataset):
        return endless(rows)  # shuffled already, and never packed
    if not arguments.packing:
        return rows.shuffle(seed=arguments.seed, keep_in_memory=True) if arguments.shuffle_dataset else rows
    from trl import pack_dataset

    if arguments.max_length is None:
        raise UserError("train.packing needs train.max_length: it is the length of a pack")
    if arguments.shuffle_dataset:
        rows = rows.shuffle(seed=arguments.seed, keep_in_memory=True)
    length, strategy = arguments.max_length, arguments.packing_strategy
    known = f"{dataset_fingerprint(rows)} {length} {strategy} {version('trl')}"
    packed = cached(
        hashlib.sha256(known.encode()).hexdigest()[:32],
        "packs",
        lambda folder: pack_dataset(
            rows, length, strategy, {"desc": "packs", "cache_file_name": str(folder / "packs.arrow")}
        ),
    )
    view = _tokens if arguments.packing_strategy == "wrapped" else _documents  # "wrapped" keeps no boundaries
    if view(rows) != view(packed):
        raise UserError(
            f"train.packing_strategy={arguments.packing_strategy}: the packs do not hold the labelled rows as they were audited "
            f"({len(rows):,} rows, {len(packed):,} packs): choose train.packing_strategy=bfd, or train.packing=false"
        )
    if arguments.shuffle_dataset:
        packed = packed.shuffle(seed=arguments.seed, keep_in_memory=True)
    return packed


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
