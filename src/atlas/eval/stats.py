"""Scores with their uncertainty, and whether one run is really better than another on the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    """The mean of one score per prompt: Wilson's interval where each is 0 or 1, else the normal one."""
    n = len(values)
    mean = sum(values) / n
    stderr = (sum((value - mean) ** 2 for value in values) / (n * max(n - 1, 1))) ** 0.5
    if all(value in (0, 1) for value in values):
        return Estimate(mean, stderr, wilson(mean, n))
    return Estimate(mean, stderr, (max(0.0, mean - Z95 * stderr), min(1.0, mean + Z95 * stderr)))


def ratio_estimate(passed: Sequence[float], of: Sequence[int]) -> Estimate:
    """Passed instructions over all, where prompts are the sampling unit: the linearised variance of a ratio of sums, since the
    instructions of one prompt are answered by the same reply (Cochran 1977, Sampling Techniques, section 6.3)."""
    n, ratio = len(of), sum(passed) / sum(of)
    residuals = sum((a - ratio * b) ** 2 for a, b in zip(passed, of, strict=True))
    stderr = (n * residuals / max(n - 1, 1)) ** 0.5 / sum(of)
    return Estimate(ratio, stderr, (max(0.0, ratio - Z95 * stderr), min(1.0, ratio + Z95 * stderr)))


ALPHA, POWER = 0.05, 0.8
_RESAMPLES = 10_000
_LEAST_DISCORDANT = 6  # five one-sided pairs give p = 0.0625 in the exact test, six 0.031


@dataclass(frozen=True)
class Difference:
    """B minus A on the same prompts."""

    value: float
    interval: tuple[float, float]
    """95 %, paired bootstrap over prompts (percentiles)."""
    p: float
    """Two-sided; exact McNemar where each prompt passes or fails, else a sign-flip permutation test."""
    smallest: float
    """The smallest true difference that this many prompts show with a probability of 80 %."""
    needed: int | None
    """Prompts that it takes to show the observed difference with that probability; None where none was observed."""

    @property
    def verdict(self) -> str:
        """better, worse, or no difference shown. Both the test and the interval have to say so, so that a page that prints both
        never contradicts itself; the test alone already keeps its 5 %."""
        low, high = self.interval
        if self.p < ALPHA and low > 0:
            return "better"
        if self.p < ALPHA and high < 0:
            return "worse"
        if self.needed is None:
            return f"no difference shown (could have shown {100 * self.smallest:.1f} points)"
        return f"no difference shown (needs about {self.needed:,} prompts to show {100 * abs(self.value):.1f} points)"


def paired_difference(
    a: Sequence[float], b: Sequence[float], of: Sequence[int] | None = None, seed: int = 0
) -> Difference:
    """Compare two runs prompt by prompt: mean of b - a, or, with `of` (instructions per prompt), sum(b - a) / sum(of).

    The prompt is the unit of resampling, since the instructions of one prompt are answered by the same reply.
    """
    import numpy as np

    d = np.asarray(b, float) - np.asarray(a, float)
    k = np.ones(len(d)) if of is None else np.asarray(of, float)
    value = float(d.sum() / k.sum())
    binary = of is None and set(np.unique(d)) <= {-1.0, 0.0, 1.0}
    if binary:
        lost, won = int((d < 0).sum()), int((d > 0).sum())
        p = mcnemar_p(lost, won)
        discordant = (lost + won) / len(d)
        smallest = smallest_difference(len(d), discordant)
        needed = prompts_needed(abs(value), discordant) if value else None
    else:
        p = sign_flip_p(d, seed)
        residuals = d - value * k
        spread = float(np.sqrt((residuals**2).mean()) / k.mean())  # of one prompt, linearised as in ratio_estimate
        smallest = _z_sum() * spread / len(d) ** 0.5
        if of is not None or not spread:  # fewer than that many prompts, by one instruction each, cannot pass the test
            smallest = max(smallest, _LEAST_DISCORDANT / float(k.sum()))
        needed = max(2, _ceil((_z_sum() * spread / abs(value)) ** 2)) if value else None
    return Difference(value, bootstrap_interval(d, k, seed), p, smallest, needed)


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test (1947): among discordant pairs, gains and losses are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def sign_flip_p(differences: "np.ndarray", seed: int = 0) -> float:
    """Two-sided permutation p of a mean of 0: under the null each prompt's difference is as likely with the other sign."""
    import numpy as np

    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    generator = np.random.default_rng(seed)
    observed, extreme = abs(moved.sum()) - 1e-12, 0
    for _ in range(0, _RESAMPLES, 500):
        flips = generator.integers(0, 2, (500, len(moved))) * 2 - 1
        extreme += int((np.abs(flips @ moved) >= observed).sum())
    return (extreme + 1) / (_RESAMPLES + 1)


def bootstrap_interval(d: "np.ndarray", k: "np.ndarray", seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of sum(d) / sum(k) over resampled prompts (Efron 1979)."""
    import numpy as np

    generator, found = np.random.default_rng(seed), []
    for _ in range(0, _RESAMPLES, 250):
        rows = generator.integers(0, len(d), (250, len(d)))
        found.append(d[rows].sum(axis=1) / k[rows].sum(axis=1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


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
