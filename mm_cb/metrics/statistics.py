"""Intervals and tests for rates and paired rates: pure functions, shares in [0, 1], randomness as a parameter."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 10_000
_BESIDE = 1e-9
_CHUNK_CELLS = 2_000_000


class Interval(NamedTuple):
    """The two ends of a 95 % confidence interval."""

    low: float
    high: float


def wilson_interval(successes: float, n: int) -> Interval:
    """95 % Wilson score interval of a rate.

    Args:
        successes: Number of successes in ``0..n``; a sum of scores in [0, 1] gives a conservative one.
        n: Number of items, at least 1.

    Returns:
        Interval inside [0, 1]; never of zero width, so 0 of 50 reads 0 to 7.1 %.

    Raises:
        ValueError: If ``n`` is below 1 or ``successes`` lies outside ``0..n``.

    Source:
        Wilson 1927, without continuity correction. Deviation: none.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"`successes` must lie in 0..`n` with `n` >= 1, got {successes} of {n}.")
    rate = successes / n
    scale = 1 + Z95**2 / n
    centre = (rate + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n)) / scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


@functools.cache
def mcnemar_exact(only_this: int, only_partner: int) -> float:
    """Two-sided exact McNemar p: a binomial test with probability 1/2 on the discordant pairs.

    Args:
        only_this: Pairs in which only the first subject shows the event.
        only_partner: Pairs in which only the second one does.

    Returns:
        p in (0, 1]; 1 when no pair is discordant. Six discordant pairs all one way give 0.03125.
    """
    from scipy.stats import binomtest

    discordant = only_this + only_partner
    if discordant == 0:
        return 1.0
    return float(binomtest(only_this, discordant, 0.5).pvalue)


def wilcoxon_signed_rank(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test: are paired differences symmetric around zero?

    Args:
        differences: One per pair, shape ``(n,)``. Equal pairs say nothing about a direction and are left out.

    Returns:
        p in (0, 1]; 1 when all pairs are equal or there are none. Exact for up to 50 unequal pairs without ties, and
        with ties for up to 13; otherwise scipy's normal approximation with correction for ties and continuity. Six
        differences all one way give 0.03125.

    Raises:
        ValueError: If a difference is not finite.

    Source:
        Wilcoxon 1945, Biometrics Bulletin 1:80, computed by `scipy.stats.wilcoxon`. Deviation: none.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("`differences` must be finite, one per pair; leave out pairs that lack a value.")
    unequal = values[values != 0]
    return float(wilcoxon(unequal, correction=True).pvalue) if unequal.size else 1.0


def paired_rate_interval(only_this: int, only_partner: int, n: int) -> Interval:
    """95 % score interval of a difference between two paired rates, this minus partner.

    Unlike a bootstrap it does not shrink to a point when no pair, or every pair, is discordant.

    Args:
        only_this: Pairs in which only the first subject shows the event.
        only_partner: Pairs in which only the second one does.
        n: All pairs.

    Returns:
        Interval inside [-1, 1] around ``(only_this - only_partner) / n``.

    Raises:
        ValueError: If the counts do not fit into ``n`` >= 1 pairs.

    Source:
        Tango 1998, Statistics in Medicine 17:891. Deviation: none.
    """
    if n < 1 or only_this < 0 or only_partner < 0 or only_this + only_partner > n:
        raise ValueError(f"discordant pairs must fit into `n` >= 1, got {only_this} + {only_partner} of {n}.")
    from scipy.optimize import brentq

    observed = (only_this - only_partner) / n

    def excess(delta: float, sign: float) -> float:
        return (n * (observed - delta)) - sign * Z95 * math.sqrt(_null_variance(only_this, only_partner, n, delta))

    # The variance can be zero at the observed difference itself, a spurious root: search just beside it.
    low = -1.0 if observed == -1 else float(brentq(excess, -1.0, observed - _BESIDE, args=(1.0,)))
    high = 1.0 if observed == 1 else float(brentq(excess, observed + _BESIDE, 1.0, args=(-1.0,)))
    return Interval(low, high)


def _null_variance(only_this: int, only_partner: int, n: int, delta: float) -> float:
    """Variance of ``only_this - only_partner`` if the true difference is ``delta`` (constrained likelihood)."""
    linear = -only_this - only_partner + (2 * n - only_this + only_partner) * delta
    constant = -only_partner * delta * (1 - delta)
    root = math.sqrt(max(0.0, linear**2 - 8 * n * constant))
    partner_only = (root - linear) / (4 * n)
    return max(0.0, n * (2 * partner_only + delta * (1 - delta)))


def bootstrap(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % percentile bootstrap interval of anything that is computed from the means of columns.

    Args:
        rows: One row per independent unit (an item, a pair, a cluster), shape ``(n, columns)``.
        statistic: From column means, shape ``(resamples, columns)``, to values, shape ``(resamples,)``.
        rng: Source of the resamples; the same generator state gives the same interval.
        resamples: Number of resamples of whole rows.

    Returns:
        Interval of the statistic; of zero width when all rows are equal, which the caller must not pass on as
        certainty.

    Raises:
        ValueError: If ``rows`` is empty or holds a value that is not finite.

    Source:
        Efron 1979, percentile method. Deviation: none.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        raise ValueError(f"`rows` must be a non-empty table of finite numbers, got shape {rows.shape}.")
    means = np.empty((resamples, rows.shape[1]))
    step = max(1, _CHUNK_CELLS // rows.size)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        means[start:stop] = rows[rng.integers(0, len(rows), size=(stop - start, len(rows)))].mean(axis=1)
    low, high = np.percentile(statistic(means), [2.5, 97.5])
    return Interval(float(low), float(high))


def bootstrap_mean(values: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> Interval:
    """`bootstrap` of the mean of ``values``, shape ``(n,)``; on paired differences it is the paired bootstrap."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap(values.reshape(-1, 1), lambda means: means[:, 0], rng, resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family of tests, in the order given; below 0.05 is significant for the whole family.

    Source:
        Holm 1979, Scandinavian Journal of Statistics 6:65. Deviation: none.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def items_needed(discordance: float, margin: float = 0.005, power: float = 0.8) -> int:
    """Items that a paired comparison needs to show, at 95 %, that two models differ by less than ``margin``.

    With so many items the 95 % interval of the paired difference lies inside ±``margin`` with probability ``power``, if
    the models are in truth equal and disagree on the share ``discordance`` of the items. Even models that agree on
    every item need some hundreds: with fewer, `paired_rate_interval` leaves more than ``margin`` open.

    Args:
        discordance: Share of items that exactly one of the two gets right, in [0, 1]; for graded scores the variance
            of the paired differences.
        margin: Largest difference to be claimed, as a share: 0.005 = half a point.
        power: Probability of success.

    Returns:
        A number of items: 21 015 for 5 % discordance and half a point, 765 for none at all.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Two one-sided tests on a paired difference, normal approximation (Julious 2004, Statistics in Medicine 23:1921).
    """
    if not (0 <= discordance <= 1 and 0 < margin < 1 and 0 < power < 1):
        raise ValueError(
            f"`discordance` must lie in 0..1, `margin` and `power` in between, got {discordance}, {margin}, {power}."
        )
    quantiles = Z95 + NormalDist().inv_cdf((1 + power) / 2)
    return max(math.ceil(Z95**2 * (1 - margin) / margin), math.ceil(quantiles**2 * discordance / margin**2))


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two judges beyond chance: 1 = always agree, 0 = as often as by chance.

    Args:
        first: One judge's verdicts.
        second: The other's, on the same items in the same order.

    Returns:
        Cohen's kappa; None when both give one and the same verdict to every item, where it is not defined.

    Raises:
        ValueError: If the lengths differ or there are no items.

    Source:
        Cohen 1960, Educational and Psychological Measurement 20:37. Deviation: none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"both judges must have judged the same items, got {len(first)} and {len(second)} verdicts.")
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0]) / n**2
    return None if expected == 1 else (agreed - expected) / (1 - expected)
