"""Intervals and tests for rates and paired rates: pure functions, shares in [0, 1], randomness as a parameter."""

import math
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


def bootstrap_mean(values: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> Interval:
    """95 % percentile bootstrap interval of a mean; on paired differences it is the paired bootstrap.

    Args:
        values: One value per item (or per pair: this minus partner), shape ``(n,)``.
        rng: Source of the resamples; the same generator state gives the same interval.
        resamples: Number of resamples.

    Returns:
        Interval around ``values.mean()``; of zero width when all values are equal, which the caller must not pass on as
        certainty.

    Raises:
        ValueError: If ``values`` is empty or holds a value that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"`values` must be a non-empty row of finite numbers, got shape {values.shape}.")
    means = np.empty(resamples)
    step = max(1, _CHUNK_CELLS // values.size)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        means[start:stop] = values[rng.integers(0, values.size, size=(stop - start, values.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))
