"""What a circuit breaker costs, in a sentence of the verdict."""

from collections.abc import Sequence

from mm_cb.metrics.observations import BESIDE
from mm_cb.metrics.results import Measurement
from mm_cb.metrics.table import SIDE_EFFECT, metric
from mm_cb.report.comparisons import MARGIN
from mm_cb.report.labels import PROXY, interval, rule_labels, signed


def cost_of(measurements: Sequence[Measurement]) -> tuple[str, bool]:
    """Which capability or benign behaviour changed measurably for the worse, and whether a capability was measured."""
    worse, seen = [], []
    prices = _prices(measurements)
    names = rule_labels((m.metric, m.condition) for m in measurements if metric(m.metric).capability)
    names |= rule_labels((m.metric, m.condition) for m, _ in prices if not metric(m.metric).capability)
    for m, ends in prices:
        proxy = f" ({PROXY})" if m.counts.get("proxy") else ""
        seen.append(f"{names[m.metric, m.condition]}{proxy} {signed(m.difference)} {interval(ends, sign=True)}")
        if metric(m.metric).worse(ends):
            worse.append(seen[-1])
    if not prices:
        return "Capability was not measured.", False
    priced = any(metric(m.metric).capability for m, _ in prices)
    begun = "" if priced else "Capability was not measured. "
    kept = sum(-MARGIN <= ends[0] and ends[1] <= MARGIN for _, ends in prices)
    shown = f"shown for {kept} of {len(prices)}" if kept else "not shown for any of them"
    same = f"Equivalence, within ± {MARGIN} points as fixed beforehand: {shown}."
    if worse:
        return f"{begun}Measurable, in points: {', '.join(worse)}. {same}", priced
    return f"{begun}No change for the worse could be told from zero, in points: {', '.join(seen)}. {same}", priced


def _prices(measurements: Sequence[Measurement]) -> list[tuple[Measurement, tuple[float, float]]]:
    """The breaker's paired differences in what it should leave alone, with their intervals.

    Of the conditions beside attacked pictures, which may be many, each metric has the one whose rise is surest.
    """
    found: list[tuple[Measurement, tuple[float, float]]] = []
    surest: dict[str, tuple[Measurement, tuple[float, float]]] = {}
    for m in measurements:
        if m.subject != "rr" or m.split != "all" or m.difference is None or m.difference_ci95 is None:
            continue
        price = m, m.difference_ci95
        kind = metric(m.metric)
        benign = kind.section == SIDE_EFFECT
        if benign and m.condition.startswith(BESIDE):
            surest[m.metric] = max(surest.get(m.metric, price), price, key=lambda one: one[1])
        elif kind.capability or (benign and m.condition == kind.strict):
            found.append(price)
    return [*found, *surest.values()]
