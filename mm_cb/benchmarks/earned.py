"""A score that a model has not earned is not claimed: official rules give points to silence."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mm_cb.metrics.results import Measurement
from mm_cb.metrics.table import metric

LUCKY = "official"
"""The condition under which an original's rule scores what a model never said: MMMU draws a letter, POPE hears yes."""


def earned(measured: Sequence[Measurement], items: Iterable[Mapping[str, Any]]) -> list[Measurement]:
    """The measurements without official values where most answers are empty or missing.

    The strict value, which gives silence nothing, and the counts stay.

    Args:
        measured: Of one run.
        items: The lines of its items.jsonl.
    """
    silent = _mostly_silent(items)
    return [_without_value(m) if m.condition == LUCKY and _source(m) in silent else m for m in measured]


def unearned_note(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """What to print where a value is not claimed."""
    return [
        f"CAUTION {metric(name).label}, {subject}: {silent} of {asked} answers are empty or missing, so that no "
        f"{LUCKY} value is claimed; the strict one gives nothing for silence"
        for (subject, name), (silent, asked) in _mostly_silent(items).items()
    ]


def _mostly_silent(items: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Subject and metric → how many answers are empty or missing, and of how many; where that is most of them."""
    asked: Counter[tuple[str, str]] = Counter()
    silent: Counter[tuple[str, str]] = Counter()
    for item in items:
        if item["condition"] == LUCKY and isinstance(item.get("completion"), str):
            address = item["subject"], item["metric"]
            asked[address] += 1
            silent[address] += not item["completion"].strip()
    return {address: (silent[address], n) for address, n in asked.items() if 2 * silent[address] > n}


def _source(m: Measurement) -> tuple[str, str]:
    return m.subject, metric(m.metric).part_of or m.metric


def _without_value(m: Measurement) -> Measurement:
    return dataclasses.replace(m, value=None, ci95=None, difference=None, difference_ci95=None)
