"""Which rows are trained on, how often and in which order; which are held out. Arithmetic on row numbers, not on rows.

Everything random comes from numpy's PCG64 with `data.seed`, so that the same config gives the same rows in the same order on any
machine.
"""

from collections.abc import Sequence

import numpy as np

from atlas.config import Source
from atlas.errors import UserError


def wanted_rows(source: Source, present: int) -> int:
    """How many rows a source must give. More than are present: rows repeat."""
    if source.share is not None:
        return max(1, round(source.share * present))
    return present if source.rows is None else source.rows


def capped(wanted: Sequence[int], weights: Sequence[float] | None, max_rows: int | None) -> list[int]:
    """`wanted`, reduced so that the sum is at most `max_rows`: in proportion to `weights`, if there are any, else to `wanted`."""
    if max_rows is None or (weights is None and sum(wanted) <= max_rows):
        return list(wanted)
    if max_rows < len(wanted):
        raise UserError(f"data.max_rows={max_rows} is less than one row for each of the {len(wanted)} sources")
    parts = np.array(wanted if weights is None else weights, float)
    shares = np.maximum(1, np.floor(max_rows * parts / parts.sum())).astype(int)
    return [min(int(share), rows) for share, rows in zip(shares, wanted, strict=True)]


def repeated(rows: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """At least `wanted` row numbers: all of `rows`, repeated as often as they fit, then a random sample of them for the rest."""
    if wanted <= len(rows) or not len(rows):
        return rows
    whole, rest = divmod(wanted, len(rows))
    return np.concatenate([np.tile(rows, whole), _generator(seed).permutation(rows)[:rest]])


def weighted(lengths: Sequence[int], weights: Sequence[float], seed: int) -> list[np.ndarray]:
    """For each source of these lengths a mask of the rows to take: as many as possible, in proportion to the weights."""
    shares = np.array(weights) / sum(weights)
    total = min(length / share for length, share in zip(lengths, shares, strict=True))
    masks = []
    for length, share in zip(lengths, shares, strict=True):
        mask = np.zeros(length, bool)
        mask[_generator(seed).permutation(length)[: max(1, round(total * share))]] = True
        masks.append(mask)
    return masks


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """For each row: is it the first with this digest?"""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first


def held_out(units: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """For each row: is it held out? Rows of one unit (a group, a prompt) stay together.

    The choice depends on units and seed alone, not on the order of the rows: when a data set grows, nearly the same units are held
    out. A unit that is larger than what is left of `wanted` is skipped.
    """
    unique, inverse, sizes = np.unique(units, return_inverse=True, return_counts=True)
    taken = np.zeros(len(unique), bool)
    left = wanted
    for unit in np.argsort(_scrambled(unique, seed), kind="stable"):
        if sizes[unit] <= left:
            taken[unit] = True
            left -= int(sizes[unit])
            if not left:
                break
    return taken[inverse]


def order(lengths: np.ndarray, sources: int, curriculum: str, seed: int) -> np.ndarray:
    """The order of the mixture's rows: several sources are shuffled, one source keeps its order, a curriculum sorts by length."""
    is_shuffled = sources > 1 or curriculum != "none"
    rows = _generator(seed).permutation(len(lengths)) if is_shuffled else np.arange(len(lengths))
    return rows[np.argsort(lengths[rows], kind="stable")] if curriculum == "length" else rows


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _scrambled(values: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014), which makes any 64-bit numbers look random."""
    with np.errstate(over="ignore"):
        mixed = values.astype(np.int64).view(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
