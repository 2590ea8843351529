"""What was kept and what was lost: capability by category, and single items that changed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mm_cb.core.records import Item
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.table import judged_as, metric, rank
from mm_cb.report.labels import rule_labels


@dataclass(frozen=True)
class CategoryRow:
    """One category of one benchmark by one rule, base and circuit breaker."""

    name: str
    """The benchmark, with the rule where it has several."""
    category: str
    base: Measurement
    breaker: Measurement


@dataclass(frozen=True)
class ChangedItem:
    """One benign item that came out differently."""

    metric: str
    name: str
    """As `CategoryRow.name`."""
    base: Item
    breaker: Item

    @property
    def shift(self) -> float:
        """Score of the circuit breaker minus score of the base; an answer instead of a refusal counts 1."""
        before, after = _good(self.base), _good(self.breaker)
        return 0.0 if before is None or after is None else after - before


def category_rows(measurements: Sequence[Measurement]) -> list[CategoryRow]:
    """Capability by category, for every benchmark and rule that both base and breaker ran; ``all`` comes last."""
    names = capability_names(measurements)
    rows = []
    for m in measurements:
        if m.subject == "rr" and metric(m.metric).capability:
            base = find(measurements, "base", m.metric, m.condition, m.split)
            if base is not None:
                rows.append(CategoryRow(names[m.metric, m.condition], m.split, base, m))
    order = list(names.values())
    return sorted(rows, key=lambda row: (order.index(row.name), row.category == "all"))


def capability_names(measurements: Iterable[Measurement]) -> dict[tuple[str, str], str]:
    """Every capability and rule that was measured, in the order of the table -> how it is called."""
    measured = [(m.metric, m.condition) for m in measurements if metric(m.metric).capability]
    return rule_labels(sorted(measured, key=lambda pair: rank(pair[0])))


def changes(items: Iterable[Item]) -> tuple[list[ChangedItem], list[ChangedItem]]:
    """Benign items on which the circuit breaker does worse than the base, and those where better, by size."""
    by_key: dict[tuple[str, str, str], dict[str, Item]] = {}
    for item in items:
        benign = judged_as(item["metric"]) != "compliance" and ":" not in item["condition"]
        if benign and item["subject"] in ("base", "rr"):
            by_key.setdefault((item["metric"], item["condition"], item["id"]), {})[item["subject"]] = item
    names = rule_labels(key[:2] for key in sorted(by_key))
    both = [
        ChangedItem(key[0], names[key[:2]], pair["base"], pair["rr"])
        for key, pair in sorted(by_key.items())
        if len(pair) == 2
    ]
    both.sort(key=lambda c: (rank(c.metric), -abs(c.shift)))
    return [c for c in both if c.shift < 0], [c for c in both if c.shift > 0]


def _good(item: Item) -> float | None:
    kind = metric(item["metric"])
    if kind.outcomes:
        return None if item.get("outcome") is None else float(item["outcome"] not in (*kind.counted, "gibberish"))
    score = item.get("score")
    return -score if score is not None and kind.higher_is_better is False else score
