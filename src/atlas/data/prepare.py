"""All sources of a config to one labelled mixture, with a ledger of every row that fell out or was cut."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.compat import dataset_fingerprint
from atlas.config import Config, Source
from atlas.data import mixture, sources
from atlas.data.cache import cached
from atlas.data.labeled import Labeled, Part, all_good, shown
from atlas.data.ledger import (
    DUPLICATE,
    FULLY_TRUNCATED,
    HELD_OUT,
    LONG_PROMPT,
    ONE_SIDE_CUT,
    SHARED_PROMPT,
    UNWEIGHTED,
    HeldOut,
    percentiles,
)
from atlas.data.pair_labels import PairLabeler
from atlas.data.stream import BATCH_ROWS, stream
from atlas.data.tokenize import Labeler
from atlas.errors import UserError
from atlas.files import digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


_LABELERS: dict[str, type[Labeler]] = {"dpo": PairLabeler}
"""Of the phases that train on something else than single conversations."""


def labeler_class(config: Config) -> type[Labeler]:
    """What makes the rows of the config's phase."""
    return _LABELERS.get(config.phase, Labeler)


def labeler_for(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeler:
    """The labeler that this config and tokenizer ask for."""
    return labeler_class(config).of(config, tokenizer)


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeled:
    """Load, label and audit every source of `data`; cached by content, so a second run starts at once.

    Raises `UserError` for a source that cannot be read and for a share of bad rows above `data.max_bad_fraction`; what the
    audit found is for `atlas.auditing.gate` to judge.
    """
    data, labeler = config.data, labeler_for(config, tokenizer)
    eval_parts = _label_all(data.eval, labeler, config, None)
    if data.streaming:
        evaluated, held, prompts = _hold_out([], eval_parts, config)
        labeled = stream(config, labeler, prompts)
    else:
        parts = _label_all(data.train, labeler, config, data.max_rows)
        if data.deduplicate:
            first = mixture.first_occurrences(_joined(parts, "digest"))
            for part, mask in zip(parts, _parted(first, parts), strict=True):
                part.keep(mask, DUPLICATE)
        evaluated, held, _ = _hold_out(parts, eval_parts, config)
        labeled = _mixed(parts, eval_parts, labeler, config)
    eval_ledgers = tuple(part.ledger for part in eval_parts)
    return replace(labeled, eval_dataset=evaluated, eval_ledgers=eval_ledgers, held_out=held)


def label_given(
    rows: "Dataset | Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]]",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    max_bad_fraction: float,
) -> Labeled:
    """Rows that are in memory (a conversation may be its list of messages alone), labelled and audited as those of a source, in
    their order. Raises `UserError` as `prepare`."""
    known = {"model": {"name": "none"}, "data": {"train": [{"name": "rows"}]}, "output": {"dir": "none"}}
    config = Config.model_validate({**known, "train": {"max_length": max_length}})
    labeler = labeler_for(config, tokenizer)
    part = _label(config.data.train[0], sources.in_memory(rows), labeler, config)
    part.ledger.refuse_if_bad(max_bad_fraction)
    return _mixed([part], [], labeler, config)


def _label_all(given: Sequence[Source], labeler: Labeler, config: Config, max_rows: int | None) -> list[Part]:
    loaded = [sources.load_source(source) for source in given]
    wanted = [mixture.wanted_rows(source, len(rows)) for source, rows in zip(given, loaded, strict=True)]
    weights = [source.weight for source in given if source.weight is not None]
    limits = mixture.capped(wanted, weights or None, max_rows)
    parts = []
    for source, rows, limit in zip(given, loaded, limits, strict=True):
        if limit < len(rows):
            rows = rows.shuffle(seed=config.data.seed, keep_in_memory=True).select(range(limit))
        part = _label(source, rows, labeler, config)
        if source.rows is not None or source.share is not None:
            part.wanted = limit
        part.ledger.refuse_if_bad(config.data.max_bad_fraction)
        parts.append(part)
    return parts


def _label(source: Source, rows: "Dataset", labeler: Labeler, config: Config) -> Part:
    """One source, labelled; the labels are cached on the disk."""
    format_name = sources.format_of(source, rows, labeler.formats)
    # As a column is called once it is renamed.
    by = next((name for name, column in source.columns.items() if column == config.data.group_by), config.data.group_by)
    known = f"{dataset_fingerprint(rows)} {labeler.fingerprint} {format_name} {by} {sorted(source.columns.items())}"
    labeled = label_rows(
        rows, labeler, known, format_name, by, source.columns, num_proc=config.data.num_proc, of=source.name
    )
    return Part(source, rows, labeled, format_name, labeler)


def _mixed(parts: list[Part], eval_parts: list[Part], labeler: Labeler, config: Config) -> Labeled:
    """The mixture of what is left of all parts, in its order."""
    data = config.data
    for part in parts:
        part.good = mixture.repeated(part.good, part.wanted, data.seed)
    weights = [source.weight for source in data.train if source.weight is not None]
    if weights:
        masks = mixture.weighted([len(part.good) for part in parts], weights, data.seed)
        for part, mask in zip(parts, masks, strict=True):
            part.keep(mask, UNWEIGHTED)
    for part in parts:
        part.settle(labeler.max_length)
        if not len(part.good):
            long = part.ledger.dropped.keys() & {LONG_PROMPT, ONE_SIDE_CUT, FULLY_TRUNCATED}
            remedy = "\n  raise train.max_length" if long else ""
            raise UserError(f"data.train: nothing is left of {part.name} to train on:\n{part.ledger.table()}{remedy}")
    lengths = _joined(parts, "length")
    order = mixture.order(lengths, len(parts), data.curriculum, data.seed)
    rows, digests = all_good(parts)[order], _joined(parts, "digest")[order]
    whole = _concatenated([part.labeled for part in parts], labeler)
    return Labeled(
        dataset=whole if np.array_equal(rows, np.arange(len(whole))) else whole.select(rows),
        ledgers=tuple(part.ledger for part in parts),
        fingerprint=hashlib.sha256(digests.astype("<i8").tobytes()).hexdigest(),
        lengths=percentiles(lengths),
        labeler=labeler,
        shown=tuple(shown(parts, eval_parts, rows, config.audit.rows)),
        digests=digests,
        tokens_of_rows=_joined(parts, "size")[order],
        read_of_rows=_joined(parts, "tokens")[order],
    )


def _hold_out(
    parts: list[Part], eval_parts: list[Part], config: Config
) -> tuple["Dataset | None", HeldOut | None, np.ndarray]:
    """Take the evaluation rows out of `parts` (or from `eval_parts`), and every training row that shares a prompt with one.

    Returns the evaluation rows, what was done, and the digests of the held-out prompts.
    """
    data = config.data
    if data.eval_fraction is None and data.eval_rows is None and not eval_parts:
        return None, None, np.zeros(0, np.int64)
    if eval_parts:
        how = ", ".join(part.name for part in eval_parts)
        for part in eval_parts:
            part.settle(config.train_value("max_length"))
        chosen = [(part, part.good) for part in eval_parts]
    else:
        if data.group_by is not None and all((part.of("unit") == part.of("prompt")).all() for part in parts):
            raise UserError(f"data.group_by: no row of data.train has a column {data.group_by!r}")
        total = sum(len(part.good) for part in parts)
        wanted = data.eval_rows if data.eval_rows is not None else round((data.eval_fraction or 0) * total)
        amount = f"{data.eval_rows:,} rows" if data.eval_rows is not None else f"{data.eval_fraction:.1%}"
        how = f"{amount} of data.train by {data.group_by or 'prompt'}"
        mask = mixture.held_out(_joined(parts, "unit"), wanted, data.seed)
        if not mask.any() or mask.all():
            raise UserError(
                f"data: {how} of {total:,} rows holds out {'all' if mask.all() else 'none'} of them: choose another amount"
                + (f" (whole values of {data.group_by} stay together)" if data.group_by else "")
            )
        chosen = []
        for part, out in zip(parts, _parted(mask, parts), strict=True):
            chosen.append((part, part.good[out]))
            part.keep(~out, HELD_OUT)
    held = {name: np.concatenate([part.numbers[name][rows] for part, rows in chosen]) for name in chosen[0][0].numbers}
    # Their loss is one of tokens, whatever the order; so hardly any padding, and what needs most memory comes first.
    order = np.argsort(-held["size"], kind="stable")
    prompts = np.unique(held["prompt"])
    before = sum(len(part.good) for part in parts)
    for part in parts:
        part.keep(~np.isin(part.of("prompt"), prompts), SHARED_PROMPT)
    done = HeldOut(
        rows=len(held["prompt"]),
        tokens=int(held["tokens"].sum()),
        supervised_tokens=int(held["supervised"].sum()),
        prompts=len(prompts),
        how=how,
        removed=before - sum(len(part.good) for part in parts) if parts else None,
    )
    whole = _concatenated([part.labeled.select(rows) for part, rows in chosen], chosen[0][0].labeler)
    return whole.select(order), done, prompts


def _joined(parts: Sequence[Part], column: str) -> np.ndarray:
    return np.concatenate([part.of(column) for part in parts])


def _parted(mask: np.ndarray, parts: Sequence[Part]) -> list[np.ndarray]:
    return np.split(mask, np.cumsum([len(part.good) for part in parts])[:-1])


def _concatenated(datasets: Sequence["Dataset"], labeler: Labeler) -> "Dataset":
    from datasets import concatenate_datasets

    rows = concatenate_datasets(list(datasets)) if len(datasets) > 1 else datasets[0]
    return rows.select_columns(list(labeler.columns))


def label_rows(
    rows: "Dataset", labeler: Labeler, known: str, *settings: Any, num_proc: int | None = None, of: str = "rows"
) -> "Dataset":
    """The columns of `Labeler.table` for every row, cached under `known`. `settings`: the other arguments of `Labeler.table`; `of`:
    whose labels they are, in messages."""
    return cached(
        known,
        "labels",
        of,
        lambda folder: rows.map(
            labeler,
            fn_kwargs={"settings": settings},
            batched=True,
            batch_size=BATCH_ROWS,
            remove_columns=rows.column_names,
            cache_file_name=str(folder / "labels.arrow"),
            new_fingerprint=digest(known)[:32],  # with num_proc datasets adds to it, and 64 is its limit
            num_proc=num_proc,
            desc="labels",
        ),
    )
