"""All sources of a config to one labelled mixture, with a ledger of every row that fell out or was cut."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.audit.spans import NOTES
from atlas.config import Config, Source
from atlas.data import mixture, sources
from atlas.data.cache import cached
from atlas.data.formats import detect, renamed
from atlas.data.labeled import Labeled, Shown
from atlas.data.ledger import (
    DUPLICATE,
    EXAMPLES,
    HELD_OUT,
    SHARED_PROMPT,
    UNWEIGHTED,
    HeldOut,
    SourceLedger,
    percentiles,
)
from atlas.data.stream import BATCH_ROWS, DETECT_ROWS, stream
from atlas.data.tokenize import Labeler
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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


class Part:
    """One source, labelled: per row the numbers that decide what becomes of it; ids and labels stay on the disk."""

    def __init__(self, source: Source, limit: int, rows: "Dataset", labeler: Labeler, config: Config) -> None:
        if limit < len(rows):
            rows = rows.shuffle(seed=config.data.seed, keep_in_memory=True).select(range(limit))
        self.name, self.wanted, self.rows = source.name, limit, rows
        self.columns = dict(source.columns)
        first = _raw(rows, range(min(len(rows), DETECT_ROWS)))
        self.format = detect(first, source.name, self.columns, source.format)
        # As a column is called once it is renamed.
        by = next(
            (name for name, column in self.columns.items() if column == config.data.group_by), config.data.group_by
        )
        known = f"{rows._fingerprint} {labeler.fingerprint} {self.format} {by} {sorted(self.columns.items())}"
        fingerprint = hashlib.sha256(known.encode()).hexdigest()[:32]
        self.labeled = label_rows(rows, labeler, fingerprint, self.format, config.data.num_proc, by, self.columns)
        facts = self.labeled.select_columns([*_NUMBERS, "reason", "detail", "findings"]).with_format("arrow")[:]
        self.numbers = {name: facts[name].to_numpy() for name in _NUMBERS if name != "group"}
        grouped = facts["group"].is_valid().to_numpy()
        # A row without a group is a group of its own, together with those that have the same prompt.
        self.numbers["unit"] = np.where(grouped, facts["group"].fill_null(0).to_numpy(), self.numbers["prompt"])
        self.grouped = int(grouped.sum())
        self.ledger = SourceLedger(source.name, len(rows), self.format)
        self.failing: list[int] = []  # the rows in which the audit found what must not be trained
        self.noted: dict[str, list[int]] = {kind: [] for kind in NOTES}  # the first rows of each kind
        self.good = self._judge(facts)

    def _judge(self, facts: Any) -> np.ndarray:
        """The numbers of the rows that can be trained on; the others, and the audit's findings, go into the ledger."""
        import pyarrow.compute as pc

        is_good = pc.equal(facts["reason"], "").to_numpy()
        bad = np.flatnonzero(~is_good)
        reasons = facts["reason"].take(bad).to_numpy(zero_copy_only=False) if len(bad) else bad
        for reason in sorted(set(reasons)):
            found = bad[reasons == reason]
            for index in found[:EXAMPLES].tolist():
                self.ledger.drop(reason, self.place(index), facts["detail"][index].as_py())
            self.ledger.dropped[reason] = len(found)
        for index in np.flatnonzero(pc.not_equal(facts["findings"], "").to_numpy()).tolist():
            findings = json.loads(facts["findings"][index].as_py())
            self.ledger.add_findings(findings, self.place(index))
            kinds = {finding["kind"] for finding in findings}
            if kinds.difference(NOTES):
                self.failing.append(index)
            for kind in kinds.intersection(NOTES):
                self.noted[kind] += [index][: EXAMPLES - len(self.noted[kind])]
        return np.flatnonzero(is_good)

    def place(self, index: int) -> str:
        row = self.rows[index] if sources.is_json_lines(self.rows) else None
        return f"{row['file']} line {row['line']}" if row else f"{self.name} row {index}"

    def of(self, column: str) -> np.ndarray:
        """A column's values of the rows in `good`."""
        return self.numbers[column][self.good]

    def keep(self, mask: np.ndarray, reason: str) -> None:
        """Set aside the good rows that are not in `mask`."""
        if aside := int((~mask).sum()):
            self.ledger.set_aside[reason] = self.ledger.set_aside.get(reason, 0) + aside
        self.good = self.good[mask]

    def settle(self, max_length: int | None) -> None:
        """Count what is used."""
        ledger, lengths = self.ledger, self.of("length")
        ledger.used = len(self.good)
        ledger.repeated = ledger.used - len(np.unique(self.good))
        ledger.tokens, ledger.supervised_tokens = int(self.of("tokens").sum()), int(self.of("supervised").sum())
        cut = lengths > self.of("tokens")
        ledger.cut = int(cut.sum())
        lost = self.of("all_supervised") - self.of("supervised")
        ledger.shortened, ledger.lost_supervised_tokens = int((lost > 0).sum()), int(lost.sum())
        ledger.cut_stops = int(self.of("cut_stops")[cut].sum())
        ledger.cut_answers = int(self.of("cut_answers")[cut].sum())
        ledger.count_lengths(lengths, self.of("supervised"), max_length)


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Labeled:
    """Load, label and audit every source of `data`; cached by content, so a second run starts at once.

    Raises `UserError` for a source that cannot be read and for a share of bad rows above `data.max_bad_fraction`; what the
    audit found is for `atlas.audit.gate` to judge.
    """
    data, labeler = config.data, labeler_for(config, tokenizer)
    eval_parts = label_all(data.eval, labeler, config, None)
    if data.streaming:
        evaluated, held, prompts = hold_out([], eval_parts, config)
        rows = stream(config, labeler, frozenset(prompts.tolist()))
        ledgers = tuple(part.ledger for part in eval_parts)
        return replace(rows, eval_dataset=evaluated, eval_ledgers=ledgers, held_out=held)
    parts = label_all(data.train, labeler, config, data.max_rows)
    if data.deduplicate:
        first = mixture.first_occurrences(_joined(parts, "digest"))
        for part, mask in zip(parts, _parted(first, parts), strict=True):
            part.keep(mask, DUPLICATE)
    evaluated, held, _ = hold_out(parts, eval_parts, config)
    for part, source in zip(parts, data.train, strict=True):
        if source.rows is not None or source.share is not None:
            part.good = mixture.repeated(part.good, part.wanted, data.seed)
    weights = [source.weight for source in data.train if source.weight is not None]
    if weights:
        masks = mixture.weighted([len(part.good) for part in parts], weights, data.seed)
        for part, mask in zip(parts, masks, strict=True):
            part.keep(mask, UNWEIGHTED)
    for part in parts:
        part.settle(labeler.max_length)
        if not len(part.good):
            raise UserError(f"data.train: nothing is left of {part.name} to train on:\n{part.ledger.table()}")
    order = mixture.order(_joined(parts, "length"), len(parts), data.curriculum, data.seed)
    digests = _joined(parts, "digest")[order]
    return Labeled(
        dataset=_dataset(parts, order),
        ledgers=tuple(part.ledger for part in parts),
        fingerprint=hashlib.sha256(digests.astype("<i8").tobytes()).hexdigest(),
        lengths=percentiles(_joined(parts, "length")),
        labeler=labeler,
        shown=tuple(_shown(parts, eval_parts, order, config.audit.rows)),
        digests=digests,
        eval_dataset=evaluated,
        eval_ledgers=tuple(part.ledger for part in eval_parts),
        held_out=held,
    )


def label_all(given: Sequence[Source], labeler: Labeler, config: Config, max_rows: int | None) -> list[Part]:
    loaded = [sources.load_source(source) for source in given]
    wanted = [mixture.wanted_rows(source, len(rows)) for source, rows in zip(given, loaded, strict=True)]
    weights = [source.weight for source in given if source.weight is not None]
    limits = mixture.capped(wanted, weights or None, max_rows)
    parts = [
        Part(source, limit, rows, labeler, config) for source, limit, rows in zip(given, limits, loaded, strict=True)
    ]
    for part in parts:
        part.ledger.refuse_if_bad(config.data.max_bad_fraction)
    return parts


def hold_out(
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
        if data.group_by is not None and not any(part.grouped for part in parts):
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
    prompts = np.unique(np.concatenate([part.numbers["prompt"][rows] for part, rows in chosen]))
    removed = 0
    for part in parts:
        clean = ~np.isin(part.of("prompt"), prompts)
        removed += int((~clean).sum())
        part.keep(clean, SHARED_PROMPT)

    def total_of(column: str) -> int:
        return sum(int(part.numbers[column][rows].sum()) for part, rows in chosen)

    held = HeldOut(
        sum(len(rows) for _, rows in chosen),
        total_of("tokens"),
        total_of("supervised"),
        len(prompts),
        how,
        removed if parts else None,
    )
    return _concatenated([part.labeled.select(rows) for part, rows in chosen]), held, prompts


def _joined(parts: Sequence[Part], column: str) -> np.ndarray:
    return np.concatenate([part.of(column) for part in parts])


def _parted(mask: np.ndarray, parts: Sequence[Part]) -> list[np.ndarray]:
    return np.split(mask, np.cumsum([len(part.good) for part in parts])[:-1])


def _concatenated(datasets: Sequence["Dataset"]) -> "Dataset":
    from datasets import concatenate_datasets

    rows = concatenate_datasets(list(datasets)) if len(datasets) > 1 else datasets[0]
    return rows.select_columns(["input_ids", "labels"])


def _dataset(parts: Sequence[Part], order: np.ndarray) -> "Dataset":
    whole = _concatenated([part.labeled for part in parts])
    starts = np.cumsum([0, *(len(part.labeled) for part in parts[:-1])])
    rows = np.concatenate([part.good + start for part, start in zip(parts, starts, strict=True)])[order]
    return whole if np.array_equal(rows, np.arange(len(whole))) else whole.select(rows)


def _shown(parts: Sequence[Part], eval_parts: Sequence[Part], order: np.ndarray, count: int) -> Iterable[Shown]:
    """For the record: the first `count` rows; before them as many that fail and as many with a note, a few of each kind, wherever
    they are, and half as many cut ones."""
    failing = np.concatenate([np.isin(part.good, part.failing) for part in parts])[order].nonzero()[0].tolist()
    outside = [(part, index) for part in parts for index in np.setdiff1d(part.failing, part.good).tolist()]
    outside += [(part, index) for part in eval_parts for index in part.failing]
    cut = (_joined(parts, "all_supervised") > _joined(parts, "supervised"))[order].nonzero()[0].tolist()
    ends = np.cumsum([len(part.good) for part in parts])
    of_kinds = [[(part, index) for index in few] for part in (*parts, *eval_parts) for few in part.noted.values()]
    noted = [at for first in zip_longest(*of_kinds) for at in first if at and at[1] not in at[0].failing]

    def row(part: Part, index: int, number: int | None) -> Shown:
        given = renamed(_raw(part.rows, [index])[0], part.columns)
        return Shown(part.place(index), given, part.format, number)

    def of_dataset(number: int) -> Shown:
        at = int(order[number])
        which = int(np.searchsorted(ends, at, side="right"))
        part = parts[which]
        return row(part, int(part.good[at - (ends[which] - len(part.good))]), number)

    def number_of(part: Part, index: int) -> int | None:
        which = parts.index(part) if part in parts else None
        at = [] if which is None else np.flatnonzero(part.good == index) + ends[which] - len(part.good)
        return next(iter(np.isin(order, at).nonzero()[0].tolist()), None)

    yield from map(of_dataset, failing[:count])
    yield from (row(part, index, None) for part, index in outside[: max(0, count - len(failing))])
    numbers = {at: number_of(*at) for at in list(dict.fromkeys(noted))[:count]}
    yield from (row(part, index, number) for (part, index), number in numbers.items())
    others = dict.fromkeys([*cut[: (count + 1) // 2], *range(min(count, len(order)))])
    yield from map(of_dataset, [n for n in others if n not in failing[:count] and n not in numbers.values()])


def _raw(rows: "Dataset", indices: Iterable[int]) -> list[Any]:
    """Rows as the labeler takes them: JSON texts or mappings of columns."""
    return [rows[index]["json"] if sources.is_json_lines(rows) else rows[index] for index in indices]


def label_rows(
    rows: "Dataset",
    labeler: Labeler,
    fingerprint: str,
    format_name: str = "messages",
    num_proc: int | None = None,
    group_by: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> "Dataset":
    """A source's rows with the columns of `_features`, one for one; cached on disk under `fingerprint`."""
    return cached(
        fingerprint,
        "labels",
        lambda folder: rows.map(
            labeler,
            fn_kwargs={"format_name": format_name, "group_by": group_by, "renaming": columns},
            batched=True,
            batch_size=BATCH_ROWS,
            remove_columns=rows.column_names,
            cache_file_name=str(folder / "labels.arrow"),
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            features=_features(),
            desc="labels",
        ),
    )


# One number per row: tokens before and after truncation, supervised ones likewise, and what decides where a row goes.
_NUMBERS = {
    "length": "int32",
    "tokens": "int32",
    "all_supervised": "int32",
    "supervised": "int32",
    "cut_stops": "int32",
    "cut_answers": "int32",
    "digest": "int64",
    "prompt": "int64",
    "group": "int64",
}


def _features() -> Any:
    from datasets import Features, List, Value

    texts = {name: Value("string") for name in ("reason", "detail", "findings")}
    numbers = {name: Value(kind) for name, kind in _NUMBERS.items()}
    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))} | numbers | texts)
