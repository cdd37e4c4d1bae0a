"""The statistics against references, and against simulated runs of which the truth is known."""

from math import comb

import numpy as np
import pytest

from atlas.eval import stats
from rows import ROOT


def test_mcnemar_is_the_exact_binomial_test():
    rng = np.random.default_rng(0)
    for lost, won in [(0, 0), (0, 5), (0, 6), (1, 1), *rng.integers(0, 60, (60, 2)).tolist()]:
        n, least = lost + won, min(lost, won)
        by_hand = min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
        assert stats.mcnemar_p(lost, won) == pytest.approx(by_hand), (lost, won)
    assert stats.mcnemar_p(0, 5) > 0.05 > stats.mcnemar_p(0, 6)


def test_tango_as_published_and_by_brute_force():
    """Tango's example of 50 pairs (12 against 2), his limits for no discordant pair, and the likelihood maximised by a search."""
    from scipy.optimize import minimize_scalar

    assert stats.tango_interval(50, 2, 12) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    assert stats.tango_interval(30, 0, 0) == pytest.approx((-0.1135, 0.1135), abs=1e-4)
    for n, lost, won in [(40, 3, 9), (20, 0, 4), (25, 25, 0)]:
        for end in stats.tango_interval(n, lost, won):
            if abs(end) == 1:
                continue

            def unlikely(q: float, n: int = n, lost: int = lost, won: int = won, end: float = end) -> float:
                cells = [(lost, q), (won, q + end), (n - lost - won, 1 - 2 * q - end)]
                return -sum(count * np.log(max(p, 1e-12)) for count, p in cells if count)

            q = minimize_scalar(unlikely, bounds=(max(0, -end), (1 - end) / 2), options={"xatol": 1e-10}).x
            variance = n * (2 * q + end * (1 - end))
            assert abs(won - lost - n * end) / variance**0.5 == pytest.approx(stats._Z_ALPHA, abs=1e-3)


def covered(n: int, lost: float, won: float, runs: int = 1500) -> float:
    """The share of intervals that hold the true difference, among simulated comparisons of pass and fail."""
    draws = np.random.default_rng(n).multinomial(n, [lost, won, 1 - lost - won], runs)[:, :2]
    held = 0
    for (a, b), times in zip(*np.unique(draws, axis=0, return_counts=True), strict=True):
        zeros, ones = np.zeros(n), np.ones(n)
        before, after = zeros.copy(), zeros.copy()
        before[:a], after[a : a + b] = ones[:a], ones[:b]
        low, high = stats.paired_difference(before, after).interval
        held += times * (low <= won - lost <= high)
    return held / runs


@pytest.mark.parametrize("n", [50, 541])
@pytest.mark.parametrize("discordant", [0.03, 0.3])
def test_intervals_hold_the_truth_where_few_pairs_differ(n: int, discordant: float):
    """The percentile bootstrap held it in 65 % at n = 50 and 3 %: it has no width where no pair differs."""
    for share in (0.5, 0.75, 0.95):
        assert covered(n, discordant * (1 - share), discordant * share) >= 0.92, share


def test_test_interval_and_verdict_never_contradict_each_other():
    for n in (5, 6, 20, 150, 541):
        for lost in range(min(n, 25)):
            for won in range(min(n - lost, 25) + 1):
                before, after = np.zeros(n), np.zeros(n)
                before[:lost], after[lost : lost + won] = 1, 1
                found = stats.paired_difference(before, after)
                low, high = found.interval
                assert low <= found.value <= high
                assert (found.p < 0.05) == (low > 0 or high < 0) == (found.verdict in ("better", "worse"))
    rng = np.random.default_rng(5)
    for _ in range(300):
        of = rng.integers(1, 4, rng.integers(2, 60))
        a, b = (rng.binomial(of, share).astype(float) for share in rng.random(2))
        found = stats.paired_difference(a, b, of)
        assert (
            (found.p < 0.05)
            == (found.interval[0] > 0 or found.interval[1] < 0)
            == (found.verdict in ("better", "worse"))
        )


def ties(rng: np.random.Generator, n: int, discordant: float, runs: int) -> list[str]:
    """Verdicts of `runs` runs against one base, none of which is truly better: each prompt has its own chance of a pass."""
    chance = rng.choice([0.0, 1.0, 0.5], n, p=[0.6 - discordant, 0.4 - discordant, 2 * discordant])
    base, *others = (rng.random((runs + 1, n)) < chance).astype(float)
    found = stats.corrected([stats.paired_difference(base, other) for other in others])
    return [each.verdict for each in found]


@pytest.mark.parametrize(("n", "discordant"), [(150, 0.1), (541, 0.2)])
def test_seven_true_ties_are_called_better_or_worse_in_at_most_five_percent(n: int, discordant: float):
    """Any of the seven; uncorrected it comes up in 17 %."""
    rng = np.random.default_rng(n)
    wrong = sum(not {"better", "worse"}.isdisjoint(ties(rng, n, discordant, 7)) for _ in range(600))
    assert wrong / 600 <= 0.05 + 2 * (0.05 * 0.95 / 600) ** 0.5


def test_the_correction_is_said():
    a, b = np.zeros(50), np.array([1.0] * 7 + [0.0] * 43)  # p 0.0156
    alone, tie = stats.paired_difference(a, b), stats.paired_difference(a, a)
    assert alone.verdict == "better" and stats.corrected([alone])[0].verdict == "better"
    found = stats.corrected([alone, tie, tie, tie])
    assert found[0].verdict == "no difference shown (p 0.016 alone, 0.062 as one of 4 comparisons)"
    assert found[0].p == alone.p and found[0].interval == alone.interval


@pytest.mark.parametrize("changed", [0.03, 0.3])
def test_luck_in_instructions(changed: float):
    """Prompts of one to three instructions; also where only one prompt or two of fifty change."""
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(2000):
        of = rng.integers(1, 4, 50)
        d = np.where(rng.random(50) < changed, rng.choice([-1, 1], 50), 0)
        wrong += stats.paired_difference(np.zeros(50), d, of).verdict in ("better", "worse")
    assert wrong / 2000 <= 0.05 + 2 * (0.05 * 0.95 / 2000) ** 0.5


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def discordant_pairs(rng: np.random.Generator, n: int, lost: float, won: float) -> tuple[np.ndarray, np.ndarray]:
    draw = rng.random(n)
    return (draw < lost).astype(float), ((draw >= lost) & (draw < lost + won)).astype(float)


@pytest.mark.parametrize("n", [50, 150, 541])
@pytest.mark.parametrize("discordant", [0.03, 0.3])
def test_luck_is_called_a_difference_in_at_most_five_percent(n: int, discordant: float):
    rng = np.random.default_rng(n)
    found = [
        stats.paired_difference(*discordant_pairs(rng, n, discordant / 2, discordant / 2)).verdict for _ in range(2000)
    ]
    wrong = sum(verdict in ("better", "worse") for verdict in found) / 2000
    assert wrong <= 0.05 + 2 * (0.05 * 0.95 / 2000) ** 0.5


def test_luck_in_scores_between_0_and_1():
    rng = np.random.default_rng(7)
    wrong = sum(
        stats.paired_difference(rng.beta(0.5, 0.5, 60), rng.beta(0.5, 0.5, 60)).verdict in ("better", "worse")
        for _ in range(1000)
    )
    assert wrong / 1000 <= 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5


@pytest.mark.parametrize(("n", "discordant"), [(150, 0.2), (541, 0.2), (541, 0.05)])
def test_power_is_as_computed(n: int, discordant: float):
    rng = np.random.default_rng(8)
    effect = stats.smallest_difference(n, discordant)
    assert stats.prompts_needed(effect, discordant) == pytest.approx(n, abs=1)
    better = sum(
        stats.paired_difference(*discordant_pairs(rng, n, (discordant - effect) / 2, (discordant + effect) / 2)).verdict
        == "better"
        for _ in range(600)
    )
    assert 0.70 <= better / 600 <= 0.86  # 80 %; the exact test is a little conservative


def test_what_541_prompts_can_show_is_what_the_docs_say():
    said = [f"{100 * stats.smallest_difference(541, share):.1f}" for share in (0.1, 0.2, 0.3)]
    docs = " ".join((ROOT / "docs" / "noise.md").read_text(encoding="utf-8").split())
    assert f"{said[0]}, {said[1]} or {said[2]} points with a probability of 80 %" in docs


def test_the_same_run_twice_differs_by_nothing_that_541_prompts_could_show():
    same = np.random.default_rng(9).integers(0, 2, 541).astype(float)
    found = stats.paired_difference(same, same)
    assert (found.value, found.p, found.needed) == (0.0, 1.0, None)
    assert found.interval == pytest.approx((-0.00705, 0.00705), abs=1e-5)
    assert found.verdict.startswith("no difference shown (could have shown 1.4 points")
    # Six instructions of 834 have to change, each in another prompt, before the test can see it.
    of = np.array([1.0, 2.0, 1.0] * 180 + [114.0])
    assert stats.paired_difference(same, same, of).verdict == "no difference shown (could have shown 0.7 points)"


def test_a_real_gain_and_its_mirror():
    a, b = np.array([0.0] * 60 + [1.0] * 40), np.array([1.0] * 30 + [0.0] * 30 + [1.0] * 40)
    up, down = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert (up.verdict, down.verdict) == ("better", "worse") and up.value == 0.3 == -down.value
    assert up.interval[0] < 0.3 < up.interval[1] and up.p < 1e-8
    few = stats.paired_difference(a[:5], b[:5])
    assert (
        few.verdict == "no difference shown (needs about 6 prompts to show 100.0 points)"
    )  # p 0.0625: five are too few


def test_estimates():
    assert stats.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    share = stats.estimate([1.0] * 3 + [0.0] * 7)
    assert share.score == 0.3 and share.stderr == pytest.approx(0.1528, abs=1e-4)
    assert share.interval == pytest.approx((0.1078, 0.6032), abs=1e-4)
    # Prompts with all of their three instructions right or none: the interval is that of 20 prompts, not of 60 instructions.
    clustered = stats.estimate([3.0] * 10 + [0.0] * 10, [3] * 20)
    assert clustered.stderr == pytest.approx(stats.estimate([1.0] * 10 + [0.0] * 10).stderr)


def test_shares_of_0_and_1_of_instructions_are_not_certain():
    """Their residuals are 0. The interval is like Wilson's, which is exact enough there: 0 of 541 prompts, at most 0.7 %."""
    for n in (1, 2, 10, 150, 541):
        none, each = stats.estimate([0.0] * n, [2] * n), stats.estimate([2.0] * n, [2] * n)
        assert (none.score, none.stderr, each.score, each.stderr) == (0, 0, 1, 0)
        assert none.interval[0] == 0 and each.interval == pytest.approx((1 - none.interval[1], 1))
        equal = stats.estimate([0.25] * n)  # a share of probability
        assert equal.score == 0.25 and equal.interval[0] < 0.25 < equal.interval[1]
        assert 0.75 * stats.wilson(0, n)[1] < none.interval[1] <= 1


@pytest.mark.parametrize("n", [10, 50, 150])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.97])
def test_intervals_of_a_share_of_instructions_hold_the_truth(n: int, share: float):
    """Instructions of one prompt pass or fail together, more or less. Without the two added prompts it fell to 24 %."""
    rng = np.random.default_rng(n)
    for alike in (0.05, 0.8):
        held = 0
        for _ in range(400):
            of = rng.integers(1, 4, n)
            easy = rng.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, n)
            found = stats.estimate(rng.binomial(of, easy).astype(float).tolist(), of.tolist())
            held += found.interval[0] <= share <= found.interval[1]
        assert held / 400 >= 0.92, alike
