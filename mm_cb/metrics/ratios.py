"""Ratios of counts, such as precision and F1: a statistic of means over items, with intervals that resample items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mm_cb.metrics.graded import no_narrower
from mm_cb.metrics.observations import Estimate, Observation
from mm_cb.metrics.statistics import bootstrap


def measure_ratio(
    this: Mapping[str, Observation],
    other: Mapping[str, Observation] | None,
    counts: dict[str, float],
    rng: np.random.Generator,
    statistic: Callable[..., Any],
) -> Estimate:
    """Value, interval, difference to ``other`` and its interval; adds to ``counts``.

    Args:
        this: The subject's observations by item id; those without a value have no verdict and stay out.
        other: The partner's, or None.
        counts: The measurement's counts.
        rng: Source of the resamples.
        statistic: From one mean (or array of means) per column to a fraction.
    """
    rows = _rows(this, this)
    value = _percent(statistic, rows)
    found = Estimate(value, len(rows), _interval(rows, rows, value, lambda means: _of(statistic, means), rng, 0.0))
    if other is None:
        return found
    shared = [id for id, o in this.items() if o.value is not None and other[id].value is not None]
    counts |= {"pairs": len(shared), "pairs_unscored": len(this) - len(shared)}
    mine, partners = _rows(this, shared), _rows(other, shared)
    values = _percent(statistic, mine), _percent(statistic, partners)
    if values[0] is None or values[1] is None:
        return found
    width = mine.shape[1]
    interval = _interval(
        np.concatenate([mine, partners], axis=1),
        mine - partners,
        values[0] - values[1],
        lambda means: _of(statistic, means[:, :width]) - _of(statistic, means[:, width:]),
        rng,
        -100.0,
    )
    return found._replace(difference=values[0] - values[1], difference_ci95=interval)


def _rows(group: Mapping[str, Observation], ids: Any) -> np.ndarray:
    return np.array([group[id].columns for id in ids if group[id].value is not None], dtype=np.float64)


def _of(statistic: Callable[..., Any], means: np.ndarray) -> np.ndarray:
    """The statistic in percent, NaN where it divides by zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.asarray(statistic(*means.T), dtype=np.float64)


def _percent(statistic: Callable[..., Any], rows: np.ndarray) -> float | None:
    if not len(rows):
        return None
    value = float(_of(statistic, rows.mean(0)))
    return value if np.isfinite(value) else None


def _interval(
    rows: np.ndarray, compared: np.ndarray, value: float | None, statistic: Any, rng: np.random.Generator, least: float
) -> tuple[float, float] | None:
    """None where every resample gives the same (a bootstrap would claim certainty) or one divides by zero.

    What is added to the bootstrap's ends stays within ``least`` and 100, where a fraction, or a difference, can lie.
    """
    if value is None or not np.ptp(rows, axis=0).any():
        return None
    found = bootstrap(rows, statistic, rng)
    if not np.isfinite(found).all() or found.low == found.high:
        return None
    low, high = no_narrower(found, value, compared, 100.0)
    return max(low, min(least, found.low)), min(high, max(100.0, found.high))
