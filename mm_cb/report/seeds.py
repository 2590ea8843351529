"""The training seeds of a circuit breaker: the main numbers of each, and over all of them."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_cb.core.records import Item
from mm_cb.metrics.graded import interval_over_seeds
from mm_cb.metrics.observations import observe
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.table import HEADLINE, WORST_CASE
from mm_cb.report.kept import capability_names
from mm_cb.report.labels import SPLITS, is_breaker

Address = tuple[str, str, str]
"""Metric, condition and split."""
Values = Mapping[tuple[str, Address], Mapping[str, float | None]]
"""Subject and address → item → value."""


@dataclass(frozen=True)
class OverSeeds:
    """A rate, or a change, over training seeds; in percent or points."""

    value: float
    ci95: tuple[float, float]
    """Two levels, `interval_over_seeds`."""


@dataclass(frozen=True)
class SeedColumn:
    """A column of the table over training seeds."""

    title: str
    values: tuple[Measurement | None, ...]
    difference: bool
    """Show the difference to the base and not the value."""
    overall: OverSeeds | None
    """Over all seeds; None where they were not measured on the same items, or the number is no mean over items."""


def breakers_of(measurements: Iterable[Measurement]) -> list[str]:
    """Every training seed of the circuit breaker, the first one first."""
    return sorted({m.subject for m in measurements if is_breaker(m.subject)})


def seed_table(measurements: Sequence[Measurement], items: Iterable[Item]) -> tuple[list[str], list[SeedColumn]]:
    """The main numbers for every training seed of the circuit breaker; nothing when there is only one."""
    subjects = breakers_of(measurements)
    if len(subjects) < 2:
        return [], []
    held = values_of(items)
    columns = []
    for title, address, difference in _wanted(measurements):
        values = tuple(find(measurements, subject, *address) for subject in subjects)
        if any(values):
            overall = over_seeds(held, subjects, address, difference=difference)
            columns.append(SeedColumn(title, values, difference, overall))
    return subjects, columns


def _wanted(measurements: Sequence[Measurement]) -> list[tuple[str, Address, bool]]:
    """Title, address, and whether the difference to the base is shown."""
    wanted = [
        ("no attack", ("compliance", "no_attack", "all"), False),
        ("PGD", ("compliance", HEADLINE, "all"), False),
        ("PGD, trained", ("compliance", HEADLINE, "trained"), False),
        (f"PGD, {SPLITS['held_out_kind']}", ("compliance", HEADLINE, "held_out_kind"), False),
        ("worst of all", ("compliance", WORST_CASE, "all"), False),
    ]
    names = capability_names(measurements)
    wanted += [(f"{name} change", (capability, rule, "all"), True) for (capability, rule), name in names.items()]
    return [
        *wanted,
        ("over-refusal change", ("over_refusal", "no_attack", "all"), True),
        ("broken text, benign", ("gibberish", "no_attack", "all"), False),
    ]


def values_of(items: Iterable[Item]) -> Values:
    """What every item counts, by subject and address; scores relative to a reference and ratios are no means."""
    held: dict[tuple[str, Address], dict[str, float | None]] = {}
    for o in observe(items):
        if o.reference is None and not o.columns:
            for split in ("all", *o.splits):
                held.setdefault((o.subject, (o.metric, o.condition, split)), {})[o.id] = o.value
    return held


def over_seeds(held: Values, subjects: Sequence[str], address: Address, *, difference: bool) -> OverSeeds | None:
    """The mean over seeds of a number, on the items of which every seed (and the base, of a difference) has a value."""
    wanted = [held.get((subject, address), {}) for subject in subjects]
    base = held.get(("base", address), {}) if difference else {}
    ids = [
        id
        for id in sorted(wanted[0])
        if all(one.get(id) is not None for one in (*wanted, *([base] if difference else [])))
    ]
    if not ids:
        return None
    values = np.array([[one[id] for id in ids] for one in wanted], dtype=np.float64)
    if difference:
        values -= np.array([base[id] for id in ids], dtype=np.float64)
    rng = np.random.default_rng(zlib.crc32("|".join(("seeds", *address)).encode()))
    low, high = interval_over_seeds(values, rng, lowest=-1.0 if difference else 0.0)
    return OverSeeds(100 * float(values.mean()), (100 * low, 100 * high))
