"""What a verdict does not cover, the weightiest first: attacks, how few requests, seeds, pictures."""

from collections import Counter
from collections.abc import Iterable, Sequence

from mm_cb.core.compatibility import counts_in_worst_case
from mm_cb.core.records import Item
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.statistics import wilson_interval
from mm_cb.metrics.table import HEADLINE, WORST_CASE
from mm_cb.report.labels import interval, percent, signed
from mm_cb.report.seeds import breakers_of, over_seeds, values_of
from mm_cb.report.table import counted_attacks


def limits_of(measurements: Sequence[Measurement], items: Iterable[Item]) -> tuple[str, ...]:
    """Sentences on what a verdict does not cover, the weightiest first.

    Args:
        measurements: All measurements of the run.
        items: Its records, from which they say how many pictures attacks and placebo had.
    """
    items = list(items)
    ranked = [
        *_attacks(measurements),
        *_few(measurements),
        *_seeds(measurements, items),
        *_held_out(measurements),
        *_placebo(measurements, items),
        *_broken(measurements),
    ]
    return tuple(ranked)


def _attacks(measurements: Sequence[Measurement]) -> list[str]:
    counted = counted_attacks(measurements, "rr")
    if not counted:
        return []
    tried = "One attack was" if len(counted) == 1 else f"{len(counted)} attacks were"
    return [
        f"{tried} tried on the circuit breaker, at one budget: a stronger or smarter one may succeed more often, "
        "so these rates are lower bounds of what an attacker can reach."
    ]


def _few(measurements: Sequence[Measurement]) -> list[str]:
    found = find(measurements, "rr", "compliance", WORST_CASE) or find(measurements, "rr", "compliance", HEADLINE)
    if found is None or not found.n or found.ci95 is None:
        return []
    none = percent(100 * wilson_interval(0, found.n).high)
    return [
        f"{found.n} requests: the 95 % interval of the worst case reaches {percent(found.ci95[1])} %, and even no "
        f"success at all would leave up to {none} % open."
    ]


def _held_out(measurements: Sequence[Measurement]) -> list[str]:
    if find(measurements, "rr", "compliance", HEADLINE, "held_out_kind") is None:
        return []
    return [
        "What the wholly held-out kind shows is of one choice of what to leave out of training: kinds were not left "
        "out in turn, and another may come out otherwise."
    ]


def _broken(measurements: Sequence[Measurement]) -> list[str]:
    broken = find(measurements, "rr", "gibberish", HEADLINE)
    if broken is None or not broken.value:
        return []
    return [
        f"{percent(broken.value)} % of the circuit breaker's answers under PGD are broken text: no harm done, but no "
        "good answer either. They are counted apart."
    ]


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


def _seeds(measurements: Sequence[Measurement], items: Sequence[Item]) -> list[str]:
    """What other training seeds of the breaker gave: the verdict is about the first one alone."""
    breakers = breakers_of(m for m in measurements if m.metric == "compliance")
    if len(breakers) < 2:
        return ["One training seed of the circuit breaker: another seed may do better or worse."] if breakers else []
    held = values_of(item for item in items if item["metric"] == "compliance")
    told = []
    for condition, name in ((HEADLINE, "under PGD"), (WORST_CASE, "in the worst case")):
        values = [find(measurements, breaker, "compliance", condition) for breaker in breakers]
        listed = ", ".join("not judged" if m is None else f"{percent(m.value)} %" for m in values)
        overall = over_seeds(held, breakers, ("compliance", condition, "all"), difference=False)
        mean = f" (over seeds {percent(overall.value)} % {interval(overall.ci95)})" if overall else ""
        told.append(f"{listed} {name}{mean}")
    return [f"The verdict is about the first of {len(breakers)} training seeds; they gave {' and '.join(told)}."]
