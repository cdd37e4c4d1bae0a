"""Scores with their uncertainty, and whether one run is really better than another on the same prompts."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from atlas.scores import Estimate, Record

if TYPE_CHECKING:
    import numpy as np

ALPHA, POWER = 0.05, 0.8
_Z_ALPHA, _Z_POWER = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
_LEAST_DECIDED = 10  # prompts for a regression with two coefficients
_LEAST_DISCORDANT = 6  # five one-sided pairs give p = 0.0625 in the exact test, six 0.031


def estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    """Each metric over all prompts."""
    found = {}
    for metric in records[0].scores:
        of = [record.weight(metric) for record in records]
        found[metric] = estimate([k * record.scores[metric] for k, record in zip(of, records, strict=True)], of)
    return found


def estimate(passed: Sequence[float], of: Sequence[int] | None = None) -> Estimate:
    """sum(passed) / sum(of), with its standard error and 95 % interval. `of` is what each prompt counts for: its number of
    instructions, or 1 where it is not given.

    Where each prompt passes or fails the interval is Wilson's (1927). Else prompts are the sampling unit, since the instructions of
    one prompt are answered by the same reply: the linearised variance of a ratio of sums (Cochran 1977, Sampling Techniques,
    section 6.3). For that interval a prompt that passes and one that fails are added, as Agresti and Coull do for a share (1998,
    The American Statistician 52:119): where no prompt passes, or each one does, the residuals are 0 and would give no width.
    """
    import numpy as np

    d, k = np.asarray(passed, float), np.ones(len(passed)) if of is None else np.asarray(of, float)
    n, ratio = len(d), float(d.sum() / k.sum())
    stderr = float((n * ((d - ratio * k) ** 2).sum() / max(n - 1, 1)) ** 0.5 / k.sum())
    if (k == 1).all() and set(np.unique(d)) <= {0.0, 1.0}:
        low, high = wilson(ratio, n)
    else:
        _, ends, _ = _linearised_t(d - k / 2, k, float(k.mean()) / 2)  # as a distance from one half
        low, high = (0.5 + end for end in ends)
    return Estimate(score=ratio, stderr=stderr, interval=(max(0.0, low), min(1.0, high)))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), which stays within 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Difference:
    """B minus A on the same prompts. p and interval agree: 0 lies outside of the one exactly when the other is below 5 %."""

    value: float
    """From -1 to 1."""
    interval: tuple[float, float]
    """95 %, of this comparison alone."""
    p: float
    """Two-sided, of this comparison alone: exact McNemar where each prompt passes or fails, else a t test."""
    smallest: float
    """The smallest true difference that this many prompts show with a probability of 80 %."""
    needed: int | None
    """Prompts that it takes to show the observed difference with that probability; None where none was observed."""
    corrected_p: float | None = None
    """After Holm's correction over the `among` comparisons that were made together; None: not corrected."""
    among: int = 1

    @property
    def verdict(self) -> str:
        """better, worse, or no difference shown, at 5 % after the correction where there is one."""
        p = self.p if self.corrected_p is None else self.corrected_p
        if p < ALPHA:
            return "better" if self.value > 0 else "worse"
        if self.p < ALPHA:
            return f"no difference shown (p {self.p:.3f} alone, {p:.3f} as one of {self.among} comparisons)"
        if self.needed is None:
            return f"no difference shown (could have shown {100 * self.smallest:.1f} points)"
        return f"no difference shown (needs about {self.needed:,} prompts to show {100 * abs(self.value):.1f} points)"

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        of = ("value", "interval", "p", "corrected_p", "among", "verdict")
        return {name: getattr(self, name) for name in of}


def paired_difference(a: Sequence[float], b: Sequence[float], of: Sequence[int] | None = None) -> Difference:
    """Compare two runs prompt by prompt: sum(b - a) / sum(of). `of` is what each prompt counts for, as in `estimate`.

    The prompt is the unit of sampling, since the instructions of one prompt are answered by the same reply.
    """
    import numpy as np

    d = np.asarray(b, float) - np.asarray(a, float)
    k = np.ones(len(d)) if of is None else np.asarray(of, float)
    value, n, one_each = float(d.sum() / k.sum()), len(d), bool((k == 1).all())
    if one_each and set(np.unique(d)) <= {-1.0, 0.0, 1.0}:
        lost, won = int((d < 0).sum()), int((d > 0).sum())
        p, (low, high) = mcnemar_p(lost, won), tango_interval(n, lost, won)
        if p >= ALPHA:  # the exact test is a little stricter than the score test that the interval inverts
            low, high = min(low, 0.0), max(high, 0.0)
        discordant = (lost + won) / n
        needed = prompts_needed(abs(value), discordant) if value else None
        return Difference(value, (low, high), p, smallest_difference(n, discordant), needed)
    # Shares of instructions change by whole instructions; other scores (of probability) by what they change on average.
    p, interval, spread = _linearised_t(d, k, float(np.sqrt((d**2).mean())) if one_each else 1.0)
    smallest, needed = (_Z_ALPHA + _Z_POWER) * spread / n**0.5, None
    if not (one_each and spread):  # less than so many instructions, each in another prompt, cannot pass the test
        smallest = max(smallest, _LEAST_DISCORDANT / float(k.sum()))
    if value:
        by_t = ((_Z_ALPHA + _Z_POWER) * spread / abs(value)) ** 2
        needed = ceil(max(by_t, _LEAST_DISCORDANT / abs(value) / float(k.mean())))
    return Difference(value, interval, p, smallest, needed)


def length_controlled(scores: Sequence[float], longer_by: Sequence[int]) -> Estimate | None:
    """The win rate at equal length, by the idea of AlpacaEval 2's length-controlled one (https://arxiv.org/abs/2404.04475).

    A logistic regression of the win on tanh(difference in length / its standard deviation), read off at a difference of 0. That
    paper's term for how hard each prompt is, which needs many models, is left out.

    `scores` are 1 for a win, 0.5 for a tie, 0 for a loss; `longer_by` is how much longer the reply of that side is, in any unit.
    Wins and losses are regressed, and ties count half, as many as there are. A win and a loss at equal length are added, as in
    `estimate`, and the slope has a normal prior of standard deviation 5: where only longer replies win it would be infinite. The
    interval is that of the robust (sandwich) variance, and of the share of ties. None where it cannot be told: fewer than 10 wins
    and losses, or no difference in length.
    """
    import numpy as np

    decided = np.asarray(scores, float) != 0.5
    y, d, n = np.asarray(scores, float)[decided], np.asarray(longer_by, float)[decided], len(scores)
    if len(y) < _LEAST_DECIDED or not d.std():
        return None
    x = np.stack([np.ones(len(y) + 2), np.append(np.tanh(d / d.std()), (0.0, 0.0))], axis=1)
    y, found, prior = np.append(y, (1.0, 0.0)), np.zeros(2), np.diag((0.0, 1 / 5**2))
    for _ in range(100):  # Newton's method with short steps; the likelihood is concave
        p = 1 / (1 + np.exp(-x @ found))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(curvature, x.T @ (y - p) - prior @ found)
        found = found + step * min(1.0, 2 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    scatter = x * (y - p)[:, None]
    spread = np.linalg.solve(curvature, np.linalg.solve(curvature, scatter.T @ scatter).T)
    reach = _Z_ALPHA * (float(spread[0, 0]) * len(y) / (len(y) - 2)) ** 0.5
    middle, low, high = (1 / (1 + np.exp(-(found[0] + z))) - 0.5 for z in (0.0, -reach, reach))
    share = float(decided.mean())
    of_ties = _Z_ALPHA * abs(middle) * (share * (1 - share) / n) ** 0.5
    below, above = (((share * (end - middle)) ** 2 + of_ties**2) ** 0.5 for end in (low, high))
    score = 0.5 + share * middle
    return Estimate(
        score=score, stderr=(below + above) / 2 / _Z_ALPHA, interval=(max(0.0, score - below), min(1.0, score + above))
    )


@cache
def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test (1947): among discordant pairs, gains and losses are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


@cache
def tango_interval(n: int, lost: int, won: int) -> tuple[float, float]:
    """95 % score interval of (won - lost) / n for paired proportions (Tango 1998, Statistics in Medicine 17:891, equation 6): all
    differences that the score test does not reject. It keeps its width where few pairs differ, or none."""
    from scipy.optimize import brentq

    def excess(difference: float) -> float:
        """|score| - z at this difference, with the share of losses that is most likely under it."""
        linear = (2 * n - won + lost) * difference - won - lost
        share = ((linear**2 + 8 * n * lost * difference * (1 - difference)) ** 0.5 - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return float(abs(won - lost - n * difference) / max(variance, 1e-300) ** 0.5 - _Z_ALPHA)

    found, edge = (won - lost) / n, 1 - 1e-12
    low = brentq(excess, -edge, found) if lost < n and excess(-edge) > 0 else -1.0
    high = brentq(excess, found, edge) if won < n and excess(edge) > 0 else 1.0
    return float(low), float(high)


def _linearised_t(d: "np.ndarray", k: "np.ndarray", unit: float) -> tuple[float, tuple[float, float], float]:
    """(p, 95 % interval, standard deviation of one prompt) of sum(d) / sum(k), by t on the linearised residuals of the ratio, as in
    `estimate`.

    One prompt that gains `unit` and one that loses it are added, as Bonett and Price do for paired proportions (2012, Journal of
    Educational and Behavioral Statistics 37:479): without them a few prompts that all move one way look certain, and none at
    all look like proof of equality.
    """
    import numpy as np
    from scipy.stats import t

    if not unit:
        return 1.0, (0.0, 0.0), 0.0
    d, k = np.append(d, (unit, -unit)), np.append(k, (k.mean(), k.mean()))
    n, middle = len(d), float(d.sum() / k.sum())
    squares = float(((d - middle * k) ** 2).sum())
    stderr = (n * squares / (n - 1)) ** 0.5 / float(k.sum())
    reach = float(t.isf(ALPHA / 2, n - 1)) * stderr
    p = float(2 * t.sf(abs(middle) / stderr, n - 1))
    return p, (max(-1.0, middle - reach), min(1.0, middle + reach)), (squares / n) ** 0.5 / float(k.mean())


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """The same differences, with p corrected for having made all these comparisons together."""
    adjusted = holm([each.p for each in found])
    return [replace(each, corrected_p=p, among=len(found)) for each, p in zip(found, adjusted, strict=True)]


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values that keep the family-wise error (Holm 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def prompts_needed(difference: float, discordant: float) -> int:
    """Pairs for 80 % power at the 5 % level (Connor 1987, Biometrics 43:207; after Miettinen 1968), when this share of pairs is
    discordant (at least the difference itself has to be)."""
    share = max(discordant, difference)
    n = (_Z_ALPHA * share**0.5 + _Z_POWER * max(share - difference**2, 0.0) ** 0.5) ** 2 / difference**2
    return max(ceil(n), ceil(_LEAST_DISCORDANT / difference))


@cache
def smallest_difference(n: int, discordant: float) -> float:
    """The difference, to a millionth, for which `prompts_needed` says n: what this many prompts could have shown. At most 1."""
    steps = 10**6
    return (
        1 + bisect_left(range(1, steps), True, key=lambda step: prompts_needed(step / steps, discordant) <= n)
    ) / steps
