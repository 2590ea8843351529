"""Relative scores: what a judge gives the candidate, as a share of what it gives the reference answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mm_cb.metrics.graded import no_narrower
from mm_cb.metrics.observations import Estimate, Observation
from mm_cb.metrics.statistics import bootstrap

FAILED_LIMIT = 0.02
"""Share of failed judgements past which no score is given."""


def relative_score(rows: np.ndarray, *, official: bool) -> float:
    """100 x the mean of the candidate's scores / the mean of the reference's.

    Args:
        rows: Reference's and candidate's score of every question, shape ``(n, 2)``, on the judge's own scale.
        official: Round as the original does: both means to 3 decimals first, the result to 1.

    Returns:
        Percent; a ratio of means, not a mean of ratios. NaN if the reference has nothing.

    Source:
        LLaVA-Bench, ``summarize_gpt_review.py``. Deviation: none with ``official``, no rounding without.
    """
    reference, candidate = np.asarray(rows, dtype=np.float64).mean(0).tolist()
    if official:
        reference, candidate = round(reference, 3), round(candidate, 3)
    if reference == 0:
        return float("nan")
    return round(candidate / reference * 100, 1) if official else candidate / reference * 100


def too_many_failed(observations: Iterable[Observation]) -> bool:
    """Whether more than 2 % of all judgements failed and were left out; failures kept as scores do not count here."""
    total = {"judgements": 0, "failed": 0, "failed_kept": 0}
    for observation in observations:
        for name in total:
            total[name] += observation.extras.get(name, 0)
    return total["failed"] - total["failed_kept"] > FAILED_LIMIT * total["judgements"]


def measure_relative(
    this: Mapping[str, Observation],
    other: Mapping[str, Observation] | None,
    counts: dict[str, float],
    rng: np.random.Generator,
    *,
    official: bool,
) -> Estimate:
    """Value, interval, difference to ``other`` and its interval; adds to ``counts``.

    Intervals resample whole questions, both models' scores together.
    """
    rows = _rows(this)
    value = relative_score(rows, official=official)
    means = [round(mean, 3) for mean in rows.mean(0).tolist()]  # as printed by the original, times ten
    counts |= {"reference_mean": round(means[0] * 10, 1), "candidate_mean": round(means[1] * 10, 1)}
    interval = _interval(rows, rows, value, lambda m: 100 * m[:, 1] / m[:, 0], rng, 0.0)
    found = Estimate(value if np.isfinite(value) else None, len(rows), interval)
    if other is None:
        return found
    shared = [id for id, o in this.items() if o.value is not None and other[id].value is not None]
    counts |= {"pairs": len(shared), "pairs_unscored": len(this) - len(shared)}
    if not shared:
        return found
    mine, partners = _rows({id: this[id] for id in shared}), _rows({id: other[id] for id in shared})
    both = np.concatenate([mine, partners], axis=1)
    difference = relative_score(mine, official=False) - relative_score(partners, official=False)
    counts |= {
        "higher_than_partner": int((mine[:, 1] > partners[:, 1]).sum()),
        "lower_than_partner": int((mine[:, 1] < partners[:, 1]).sum()),
    }
    interval = _interval(
        both, mine - partners, difference, lambda m: 100 * (m[:, 1] / m[:, 0] - m[:, 3] / m[:, 2]), rng, -np.inf
    )
    return found._replace(difference=difference if np.isfinite(difference) else None, difference_ci95=interval)


def _rows(group: Mapping[str, Observation]) -> np.ndarray:
    return np.array([(o.reference, o.value) for o in group.values() if o.value is not None], dtype=np.float64)


def _interval(
    rows: np.ndarray, compared: np.ndarray, value: float, statistic: Any, rng: np.random.Generator, least: float
) -> tuple[float, float] | None:
    """None where all questions score the same (a bootstrap would claim certainty) or a resample can divide by zero."""
    if not np.ptp(rows, axis=0).any() or (rows[:, ::2] <= 0).any():
        return None
    low, high = no_narrower(bootstrap(rows, statistic, rng), value, compared, 100.0)
    return (max(least, low), high)
