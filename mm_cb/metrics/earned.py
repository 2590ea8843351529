"""A score that a model has not earned is not claimed: official rules give points to silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mm_cb.core.records import Item
from mm_cb.metrics.table import metric

LUCKY = "official"
"""The condition under which an original's rule scores what a model never said: MMMU draws a letter, POPE hears yes."""


def mostly_silent(items: Iterable[Item]) -> dict[tuple[str, str], tuple[int, int]]:
    """Subject and metric → how many answers are empty or missing, and of how many; where that is most of them.

    Their official values are not claimed. The strict ones, which give silence nothing, and the counts stay.

    Args:
        items: The lines of items.jsonl.
    """
    asked: Counter[tuple[str, str]] = Counter()
    silent: Counter[tuple[str, str]] = Counter()
    for item in items:
        if item["condition"] == LUCKY and isinstance(item.get("completion"), str):
            address = item["subject"], item["metric"]
            asked[address] += 1
            silent[address] += not item["completion"].strip()
    return {address: (silent[address], n) for address, n in asked.items() if 2 * silent[address] > n}


def is_earned(subject: str, name: str, condition: str, silent: Iterable[tuple[str, str]]) -> bool:
    """Whether a value may be claimed; a part of another metric goes with that one."""
    return condition != LUCKY or (subject, metric(name).part_of or name) not in silent


def unearned_note(items: Iterable[Item]) -> list[str]:
    """What to print where a value is not claimed."""
    return [
        f"CAUTION {metric(name).label}, {subject}: {silent} of {asked} answers are empty or missing, so that no "
        f"{LUCKY} value is claimed; the strict one gives nothing for silence"
        for (subject, name), (silent, asked) in mostly_silent(items).items()
    ]
