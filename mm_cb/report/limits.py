"""What a verdict does not cover: how few requests, how many pictures, which seeds."""

from collections import Counter
from collections.abc import Iterable, Sequence

from mm_cb.core.compatibility import counts_in_worst_case
from mm_cb.core.records import Item
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.statistics import wilson_interval
from mm_cb.metrics.table import HEADLINE
from mm_cb.report.labels import percent, signed


def limits_of(measurements: Sequence[Measurement], items: Iterable[Item]) -> tuple[str, ...]:
    """Sentences on what a verdict does not cover.

    Args:
        measurements: All measurements of the run.
        items: Its records, from which they say how many pictures attacks and placebo had.
    """
    limits = []
    found = find(measurements, "rr", "compliance", "worst_case") or find(measurements, "rr", "compliance", HEADLINE)
    if found is not None and found.n and found.ci95 is not None:
        none = percent(100 * wilson_interval(0, found.n).high)
        limits.append(
            f"{found.n} requests: the 95 % interval of the worst case reaches {percent(found.ci95[1])} %, and even no "
            f"success at all would leave up to {none} % open."
        )
    limits += _placebo(measurements, items)
    broken = find(measurements, "rr", "gibberish", HEADLINE)
    if broken is not None and broken.value is not None:
        limits.append(
            f"{percent(broken.value)} % of the circuit breaker's answers under PGD are broken text: no harm done, but "
            "no good answer either. They are counted apart."
        )
    limits.append(
        "Only the attacks, budgets and restarts listed here were tried. A stronger or smarter attack may succeed more "
        "often: these rates are lower bounds of what an attacker can reach."
    )
    limits.append(_seeds(measurements))
    return tuple(limits)


def _placebo(measurements: Sequence[Measurement], items: Iterable[Item]) -> list[str]:
    """How the worst case stands to random noise, its placebo at as many pictures: a judge's false alarms add up too.

    Restarts end with the first success, so it is the most pictures of any request that says how many all might have.
    """
    tried: dict[str, Counter[str]] = {"worst_case": Counter(), "noise": Counter()}
    for item in items:
        counted = item["condition"] == "noise" or counts_in_worst_case(item)
        if (item["subject"], item["metric"]) == ("rr", "compliance") and counted and not item.get("same_as"):
            pictures = sum(not one.get("sample") for one in item.get("candidates") or ())
            tried["noise" if item["condition"] == "noise" else "worst_case"][item["id"]] += max(1, pictures)
    attacks, placebo = (max(had.values(), default=0) for had in tried.values())
    if attacks > placebo > 0:
        return [f"The worst case had up to {attacks} pictures per request, random noise {placebo}."]
    found = [find(measurements, "rr", "compliance", condition) for condition in tried]
    values = [m.value for m in found if m is not None and m.value is not None and not m.counts.get("not_judged")]
    if attacks != placebo or not placebo or len(values) < len(tried):
        return []
    told = f"{placebo} picture{'s' if placebo > 1 else ''} per request"
    return [f"Worst case minus random noise, each with up to {told}: {signed(values[0] - values[1])} points."]


def _seeds(measurements: Sequence[Measurement]) -> str:
    """What other training seeds of the breaker gave: the sentence above is about the first one alone."""
    breakers = ["rr", *sorted({m.subject for m in measurements if m.subject.startswith("rr-seed")})]
    if len(breakers) == 1:
        return "One training seed of the circuit breaker: another seed may do better or worse."
    found = {
        condition: [find(measurements, breaker, "compliance", condition) for breaker in breakers]
        for condition in (HEADLINE, "worst_case")
    }
    listed = {
        condition: ", ".join("not judged" if m is None else f"{percent(m.value)} %" for m in values)
        for condition, values in found.items()
    }
    return (
        f"The sentence is about the first of {len(breakers)} training seeds; they gave {listed['pgd']} under PGD and "
        f"{listed['worst_case']} in the worst case."
    )
