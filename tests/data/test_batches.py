"""The order of rows in groups of similar length, and what ways to batch cost by the estimate."""

import numpy as np
import pytest

from atlas.data.batches import GROUP, PACK, PAD, LengthGroups, Work, padded


def lengths(count: int) -> np.ndarray:
    """As of conversations: many short ones, few long ones."""
    return np.minimum(np.random.default_rng(3).lognormal(5, 0.8, count).astype(np.int64) + 20, 1024)


@pytest.mark.parametrize(("count", "rows"), [(1, 4), (3, 4), (8, 2), (32, 4), (35, 4), (1001, 16)])
def test_each_row_once_in_each_epoch_and_other_micro_batches(count: int, rows: int):
    given, seen = lengths(count), []
    for epoch in range(8):
        groups = LengthGroups(given, rows, 1, seed=7)
        groups.set_epoch(epoch)
        order = list(groups)
        assert sorted(order) == [*range(count)] and len(groups) == count
        assert order == list(groups)  # of seed and epoch alone
        seen.append(frozenset(frozenset(order[at : at + rows]) for at in range(0, count, rows)))
    assert len({*seen}) >= (1 if count <= rows else 3 if count == 8 else 8)  # 8 rows make few pairs of similar length
    assert list(LengthGroups(given, rows, 1, seed=8)) != list(LengthGroups(given, rows, 1, seed=7)) or count < 8


@pytest.mark.parametrize(("micro_batches", "most"), [(8, 0.6), (20, 0.4), (250, 0.1), (5000, 0.06)])
def test_groups_have_less_padding_than_random_micro_batches(micro_batches: int, most: float):
    """A share of what random order has, on average over epochs, also where there are few micro-batches."""
    given = lengths(4 * micro_batches)
    groups, random = LengthGroups(given, 4, 1, seed=1), np.random.default_rng(0)
    shares: dict[str, list[float]] = {"group": [], "random": []}
    for epoch in range(20):
        groups.set_epoch(epoch)
        for name, order in (("group", groups.order()), ("random", random.permutation(len(given)))):
            shares[name].append(1 - given.sum() / padded(given[order], 4))
    assert np.mean(shares["random"]) > 0.3
    assert np.mean(shares["group"]) < most * np.mean(shares["random"])


def test_a_step_of_some_micro_batches_mixes_lengths():
    given = lengths(1024)
    steps = given[LengthGroups(given, 4, 1, seed=1).order()].reshape(-1, 16)
    spread = steps.mean(1).std() / given.mean()
    assert spread < 1.2 * 2 * given.std() / given.mean() / 4  # 4 micro-batches are 4 draws, of 16 rows it would be 16


def test_processes_get_micro_batches_of_similar_length_at_the_same_time():
    """accelerate gives micro-batch i to process i mod 2; what does not fill a micro-batch for each process is left out."""
    given = lengths(67)
    order = LengthGroups(given, 4, 2, seed=1).order()
    longest = given[order[:64]].reshape(-1, 2, 4).max(2)
    apart = np.abs(longest[:, 0] - longest[:, 1]).mean()
    assert apart < 0.5 * np.abs(longest[1:, 0] - longest[:-1, 0]).mean()


def test_what_micro_batches_cost():
    given = np.array([2, 4, 6, 3, 5])
    assert padded(given, 2) == 2 * 4 + 2 * 6 + 5
    assert padded(given, 2, multiple=4) == 2 * 4 + 2 * 8 + 8
    assert padded(given, 2, multiple=4, packed=True) == 8 + 12 + 8
    rows = (4 + 16 + 36 + 9 + 25) / 2
    padding = 2 * 16 + 2 * 36 + 25 / 2  # alone in its micro-batch the last one has no mask
    pairs = {PAD: padding, GROUP: padding, PACK: 36 + 81 + 25}
    for way, count in pairs.items():
        tokens = 20 if way == PACK else padded(given, 2)
        assert Work(pair=0.5, each=10).of(way, given, 2) == tokens + 0.5 * count + 3 * 10
        by_row = rows if way == PACK else padding
        assert Work(0.5, 10, by_row=True).of(way, given, 2) == tokens + 0.5 * by_row + 3 * 10
        assert Work(0.5, 10, by_row=True, flash=True).of(way, given, 2) == tokens + 0.5 * rows + 3 * 10
