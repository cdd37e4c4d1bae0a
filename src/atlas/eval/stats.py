"""Scores with their uncertainty, and whether one run is really better than another on the same prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A score with its standard error and 95 % interval, all in [0, 1]."""

    score: float
    stderr: float
    interval: tuple[float, float]


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), which stays within 0 and 1."""
    middle = share + Z95 * Z95 / (2 * n)
    spread = Z95 * (share * (1 - share) / n + Z95 * Z95 / (4 * n * n)) ** 0.5
    return (middle - spread) / (1 + Z95 * Z95 / n), (middle + spread) / (1 + Z95 * Z95 / n)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of one score per prompt: Wilson's interval where each is 0 or 1, else that of `ratio_estimate`."""
    n = len(values)
    found = ratio_estimate(values, [1] * n)
    return replace(found, interval=wilson(found.score, n)) if all(value in (0, 1) for value in values) else found


def ratio_estimate(passed: Sequence[float], of: Sequence[int]) -> Estimate:
    """Passed instructions over all, where prompts are the sampling unit: the linearised variance of a ratio of sums, since the
    instructions of one prompt are answered by the same reply (Cochran 1977, Sampling Techniques, section 6.3).

    For the interval a prompt that passes and one that fails are added, as Agresti and Coull do for a share (1998, The American
    Statistician 52:119): where no prompt passes, or each one does, the residuals are 0 and would give an interval without width.
    """
    import numpy as np

    n, ratio = len(of), sum(passed) / sum(of)
    residuals = sum((a - ratio * b) ** 2 for a, b in zip(passed, of, strict=True))
    stderr = (n * residuals / max(n - 1, 1)) ** 0.5 / sum(of)
    k = np.asarray(of, float)
    _, (low, high), _ = linearised_t(
        np.asarray(passed, float) - k / 2, k, float(k.mean()) / 2
    )  # as a distance from one half
    return Estimate(ratio, stderr, (max(0.0, 0.5 + low), min(1.0, 0.5 + high)))


def estimates(scores: Sequence[Mapping[str, float]], instructions: Sequence[int]) -> dict[str, Estimate]:
    """Each metric over prompts: scores of each prompt, and its number of instructions, whose shares are named `inst_...`."""
    found = {}
    for metric in scores[0]:
        values = [of_prompt[metric] for of_prompt in scores]
        if metric.startswith("inst_"):
            passed = [count * value for count, value in zip(instructions, values, strict=True)]
            found[metric] = ratio_estimate(passed, instructions)
        else:
            found[metric] = mean_estimate(values)
    return found


ALPHA, POWER = 0.05, 0.8
_LEAST_DISCORDANT = 6  # five one-sided pairs give p = 0.0625 in the exact test, six 0.031


@dataclass(frozen=True)
class Difference:
    """B minus A on the same prompts. p and interval agree: 0 lies outside of the one exactly when the other is below 5 %."""

    value: float
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


def paired_difference(a: Sequence[float], b: Sequence[float], of: Sequence[int] | None = None) -> Difference:
    """Compare two runs prompt by prompt: mean of b - a, or, with `of` (instructions per prompt), sum(b - a) / sum(of).

    The prompt is the unit of sampling, since the instructions of one prompt are answered by the same reply.
    """
    import numpy as np

    d = np.asarray(b, float) - np.asarray(a, float)
    k = np.ones(len(d)) if of is None else np.asarray(of, float)
    value = float(d.sum() / k.sum())
    if set(np.unique(d)) <= {-1.0, 0.0, 1.0} and set(np.unique(k)) == {1.0}:
        lost, won = int((d < 0).sum()), int((d > 0).sum())
        p, (low, high) = mcnemar_p(lost, won), tango_interval(len(d), lost, won)
        if p >= ALPHA:  # the exact test is a little stricter than the score test that the interval turns round
            low, high = min(low, 0.0), max(high, 0.0)
        discordant = (lost + won) / len(d)
        needed = prompts_needed(abs(value), discordant) if value else None
        return Difference(value, (low, high), p, smallest_difference(len(d), discordant), needed)
    p, interval, spread = linearised_t(d, k, 1.0 if of is not None else float(np.sqrt((d**2).mean())))
    smallest = _z_sum() * spread / len(d) ** 0.5
    needed = None
    if of is not None or not spread:  # fewer than that many prompts, by one instruction each, cannot pass the test
        smallest = max(smallest, _LEAST_DISCORDANT / float(k.sum()))
    if value:
        needed = max(_ceil((_z_sum() * spread / abs(value)) ** 2), _ceil(_LEAST_DISCORDANT / abs(value) / k.mean()))
    return Difference(value, interval, p, smallest, needed)


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
        return float(abs(won - lost - n * difference) / max(variance, 1e-300) ** 0.5 - Z95)

    found = (won - lost) / n
    low = -1.0 if lost == n else brentq(excess, -1 + 1e-12, found) if excess(-1 + 1e-12) > 0 else -1.0
    high = 1.0 if won == n else brentq(excess, found, 1 - 1e-12) if excess(1 - 1e-12) > 0 else 1.0
    return float(low), float(high)


def linearised_t(d: "np.ndarray", k: "np.ndarray", unit: float) -> tuple[float, tuple[float, float], float]:
    """(p, 95 % interval, standard deviation of one prompt) of sum(d) / sum(k), by t on the linearised residuals of the ratio, as in
    `ratio_estimate`.

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
    z_alpha, z_beta = _z()
    n = (z_alpha * share**0.5 + z_beta * max(share - difference**2, 0.0) ** 0.5) ** 2 / difference**2
    return max(_ceil(n), _ceil(_LEAST_DISCORDANT / difference))


@cache
def smallest_difference(n: int, discordant: float) -> float:
    """The difference for which `prompts_needed` says n: what this many prompts could have shown. At most 1."""
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if prompts_needed(middle, discordant) <= n else (middle, high)
    return high


@cache
def _z() -> tuple[float, float]:
    from scipy.stats import norm

    return float(norm.isf(ALPHA / 2)), float(norm.isf(1 - POWER))


def _z_sum() -> float:
    return sum(_z())


def _ceil(value: float) -> int:
    return -int(-value // 1)
