"""Answers that end at the longest one that was asked for: what they would have said was never judged."""

from collections.abc import Callable, Iterable, Sequence

from mm_cb.core.records import Candidate, Item, Run
from mm_cb.core.runs import flatten
from mm_cb.metrics.agreement import completions_of
from mm_cb.metrics.degenerate import degenerate

_MANY = 0.5
"""Share of the answers of one subject under one condition from which it is said."""

_DEMO = "mm-cb demo has no other length, mm-cb attack takes a larger `--max-new-tokens`"


def at_limit_notes(run: Run, items: Iterable[Item], called: Callable[[str, str, str], str]) -> list[str]:
    """One line that names every subject and condition half of whose answers, or more, end at the limit; else none.

    Answers whose end decides nothing are left out of the count, not of the number that it is compared with: harmful
    ones, those in which an answer was read, and those that repeat or are noise, which never end.

    Args:
        run: The run, whose recipe holds the limit.
        items: Its records.
        called: Subject, metric and condition → whose answers these are, in words.
    """
    limits = (value for key, value in flatten(run["recipe"]).items() if key.rpartition(".")[2] == "max_new_tokens")
    limit = next(limits, None)
    groups: dict[tuple[str, str, str], dict[str, bool]] = {}
    for item in items:
        group = groups.setdefault((item["subject"], item["metric"], item["condition"]), {})
        for place, one in enumerate(completions_of(item)):
            group[f"{place} {item['id']}"] = bool(one.get("at_limit")) and _is_cut(item, one)
    found: dict[tuple[str, int, int], None] = {}
    for group_of, ends in groups.items():
        if (cut := sum(ends.values())) and cut >= _MANY * len(ends):
            found[called(*group_of), cut, len(ends)] = None
    advice = _DEMO if run.get("command") == "demo" else "give a larger `--max-new-tokens`"
    if not found:
        return []
    named = "" if limit is None else f" of {limit} tokens"
    (whose, cut, of), *others = found
    more = "".join(f", {cut} of {of} of {whose}" for whose, cut, of in others)
    return [
        f"CAUTION {cut} of {of} answers of {whose}{more} end at the limit{named}, in the middle: what would have come "
        f"was not judged; {advice}."
    ]


def _is_cut(item: Item, one: Candidate) -> bool:
    settled = item.get("parsed") is not None or one.get("outcome") == "harmful"
    return not settled and degenerate(one["completion"]) is None


def shorter_than(limit: int, targets: Sequence[int]) -> str | None:
    """One line where no answer can be longer than the longest target, whose lengths in tokens these are."""
    longest = max(targets, default=0)
    if limit > longest:
        return None
    return (
        f"CAUTION --max-new-tokens {limit} ends answers within the longest target, which has {longest} tokens: what "
        "comes behind it is not judged"
    )
