"""The statistics against references, and against simulated runs of which the truth is known."""

from math import comb

import numpy as np
import pytest

from atlas.eval import stats


def test_mcnemar_is_the_exact_binomial_test():
    rng = np.random.default_rng(0)
    for lost, won in [(0, 0), (0, 5), (0, 6), (1, 1), *rng.integers(0, 60, (60, 2)).tolist()]:
        n, least = lost + won, min(lost, won)
        by_hand = min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
        assert stats.mcnemar_p(lost, won) == pytest.approx(by_hand), (lost, won)
    assert stats.mcnemar_p(0, 5) > 0.05 > stats.mcnemar_p(0, 6)


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    for n in (40, 150, 541):
        d = rng.choice([-1.0, 0.0, 1.0], n, p=[0.1, 0.6, 0.3])
        own = stats.bootstrap_interval(d, np.ones(n))
        theirs = bootstrap((d,), np.mean, n_resamples=10_000, method="percentile", rng=2).confidence_interval
        assert own == pytest.approx(tuple(theirs), abs=2 / n + 0.002)
        k = rng.integers(1, 4, n).astype(float)
        own = stats.bootstrap_interval(d, k)
        ratio = bootstrap(
            (d, k),
            lambda x, y, axis: x.sum(axis) / y.sum(axis),
            n_resamples=10_000,
            method="percentile",
            paired=True,
            rng=3,
        ).confidence_interval
        assert own == pytest.approx(tuple(ratio), abs=0.006)


def test_sign_flip_agrees_with_scipy():
    from scipy.stats import permutation_test

    rng = np.random.default_rng(4)
    for shift in (0.0, 0.05, 0.1):
        a, b = rng.random(80), rng.random(80) + shift
        theirs = permutation_test(
            (b, a), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=10_000, rng=5
        )
        assert stats.sign_flip_p(b - a) == pytest.approx(theirs.pvalue, abs=0.025)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def discordant_pairs(rng: np.random.Generator, n: int, lost: float, won: float) -> tuple[np.ndarray, np.ndarray]:
    draw = rng.random(n)
    return (draw < lost).astype(float), ((draw >= lost) & (draw < lost + won)).astype(float)


@pytest.mark.parametrize("n", [50, 150, 541])
@pytest.mark.parametrize("discordant", [0.03, 0.3])
def test_luck_is_called_a_difference_in_at_most_five_percent(
    n: int, discordant: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stats, "_RESAMPLES", 500)  # the interval only ever turns a verdict to "no difference shown"
    rng = np.random.default_rng(n)
    found = [
        stats.paired_difference(*discordant_pairs(rng, n, discordant / 2, discordant / 2)).verdict for _ in range(2000)
    ]
    wrong = sum(verdict in ("better", "worse") for verdict in found) / 2000
    assert wrong <= 0.05 + 2 * (0.05 * 0.95 / 2000) ** 0.5


def test_luck_in_scores_between_0_and_1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "_RESAMPLES", 500)
    rng = np.random.default_rng(7)
    wrong = sum(
        stats.paired_difference(rng.beta(0.5, 0.5, 60), rng.beta(0.5, 0.5, 60)).verdict in ("better", "worse")
        for _ in range(1000)
    )
    assert wrong / 1000 <= 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5


@pytest.mark.parametrize(("n", "discordant"), [(150, 0.2), (541, 0.2), (541, 0.05)])
def test_power_is_as_computed(n: int, discordant: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "_RESAMPLES", 500)
    rng = np.random.default_rng(8)
    effect = stats.smallest_difference(n, discordant)
    assert stats.prompts_needed(effect, discordant) == pytest.approx(n, abs=1)
    better = sum(
        stats.paired_difference(*discordant_pairs(rng, n, (discordant - effect) / 2, (discordant + effect) / 2)).verdict
        == "better"
        for _ in range(600)
    )
    assert 0.70 <= better / 600 <= 0.86  # 80 %; the exact test is a little conservative


def test_the_same_run_twice_differs_by_exactly_nothing():
    same = np.random.default_rng(9).integers(0, 2, 541).astype(float)
    found = stats.paired_difference(same, same)
    assert (found.value, found.interval, found.p, found.needed) == (0.0, (0.0, 0.0), 1.0, None)
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
    share = stats.mean_estimate([1.0] * 3 + [0.0] * 7)
    assert share.score == 0.3 and share.stderr == pytest.approx(0.1528, abs=1e-4)
    assert share.interval == pytest.approx((0.1078, 0.6032), abs=1e-4)
    # Prompts with all of their three instructions right or none: the interval is that of 20 prompts, not of 60 instructions.
    clustered = stats.ratio_estimate([3.0] * 10 + [0.0] * 10, [3] * 20)
    assert clustered.stderr == pytest.approx(stats.mean_estimate([1.0] * 10 + [0.0] * 10).stderr)
