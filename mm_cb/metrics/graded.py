"""Intervals of graded scores, in which few items may differ, and of rates over training seeds."""

import math

import numpy as np

from mm_cb.metrics.statistics import Z95, Interval, bootstrap_mean


def no_narrower(found: Interval, value: float, rows: np.ndarray, scale: float = 1.0) -> Interval:
    """A bootstrap interval that is never narrower than what items alike leave open.

    A bootstrap draws from what it saw. Where nearly all items are alike it knows the few others alone, and one small
    difference among 300 items would read as surer than none at all. So each end stands off from ``value`` by at least
    the half width of the score interval where no pair differs, ``z² / (n + z²)``, times the share of items that repeat
    the most common one.

    Args:
        found: The bootstrap's interval, or ``value`` twice where all items are alike.
        value: The statistic itself.
        rows: What the bootstrap drew from (of a paired difference, the differences), ``(n,)`` or ``(n, columns)``.
        scale: What the range of one item's value comes to in the unit of ``value``: 1, or 100 in percent.

    Returns:
        An interval that holds ``found``. Where all items are alike it is `wilson_interval` of 0 or ``n`` of ``n``, and
        `paired_rate_interval` without a discordant pair; where no two are alike it is ``found``.
    """
    n = len(rows)
    most = int(np.unique(np.asarray(rows, dtype=np.float64).round(9), axis=0, return_counts=True)[1].max())
    alike = (most - 1) / (n - 1) if n > 1 else 1.0
    least = scale * alike * Z95**2 / (n + Z95**2)
    return Interval(min(found.low, value - least), max(found.high, value + least))


def graded_interval(values: np.ndarray, rng: np.random.Generator, *, lowest: float = 0.0) -> Interval:
    """95 % interval of a mean of graded values: percentile bootstrap, by the rule of `no_narrower`.

    Args:
        values: Scores or paired differences, shape ``(n,)``.
        rng: Source of the resamples.
        lowest: Least possible value: 0 for scores in [0, 1], -1 for their differences. The largest is 1.
    """
    mean = float(np.mean(values))
    found = bootstrap_mean(values, rng) if np.ptp(values) > 0 else Interval(mean, mean)
    low, high = no_narrower(found, mean, values)
    return Interval(max(lowest, low), min(1.0, high))


def interval_over_seeds(values: np.ndarray, rng: np.random.Generator, *, lowest: float = 0.0) -> Interval:
    """95 % interval of a mean over training seeds, which holds for a seed and items that were not drawn.

    Two levels: the seeds' means vary by Student's t with one degree of freedom less than there are seeds, and the items
    by `graded_interval` of each item's mean over the seeds; both distances from the mean are added in quadrature.

    Args:
        values: Every seed's value of every item, shape ``(seeds, items)``, of at least two seeds on the same items.
        rng: Source of the resamples.
        lowest: Least possible value: 0 for rates and scores, -1 for differences. The largest is 1.

    Returns:
        The interval. Two seeds that differ leave nearly everything open, as they should: t is 12.7 then.

    Raises:
        ValueError: If there are fewer than two seeds, or no items.
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not values.size:
        raise ValueError(f"`values` must hold the items of at least two seeds, got shape {values.shape}.")
    means = values.mean(axis=1)
    seeds = float(t.ppf(0.975, len(means) - 1)) * float(means.std(ddof=1)) / math.sqrt(len(means))
    low, high = graded_interval(values.mean(axis=0), rng, lowest=lowest)
    mean = float(means.mean())
    return Interval(max(lowest, mean - math.hypot(seeds, mean - low)), min(1.0, mean + math.hypot(seeds, high - mean)))
