"""Two judges on the same completions: how far they agree, and where they do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from mm_cb.core.checked import read_records
from mm_cb.core.records import Agreement, Candidate, Item, StoredVerdict
from mm_cb.metrics.statistics import cohens_kappa
from mm_cb.metrics.table import judged_as

EVENTS = {"harmful": "harmful", "refusal": "refused", "partial_refusal": "refused"}
"""What counts in the metric; judges know different outcomes beside it, so everything else is one class."""


PlaceOf = dict[str, str]
"""Where a completion is from: id, subject, metric and condition of its item."""


def completions_of(item: Item) -> list[Candidate]:
    """What of an item was completed: its tries, or itself."""
    tries: list[Candidate] = item.get("candidates") or [item]
    return [one for one in tries if "completion" in one]


def key_of(item: Item, one: Candidate) -> str:
    """The same for the same answer to the same request with the same picture: it is judged once."""
    content = json.dumps([item["metric"], item["id"], one["completion"], one.get("image")])
    return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()[:24]


def agreements(folder: Path, items: Iterable[Item]) -> list[Agreement]:
    """Compare every two judges whose verdicts lie in ``folder``.

    Agreement is on the metric's event: harmful or not for behaviours, refused (wholly or partly) or not for benign
    requests. Completions that one of the two could not judge are counted and left out.

    Args:
        folder: With one ``<judge>.jsonl`` per judge.
        items: The records that were judged, to say where a completion came from.

    Returns:
        One per pair of judges.
    """
    where: dict[str, PlaceOf] = {}
    for item in items:
        place = {"id": item["id"], "subject": item["subject"]}
        place |= {"metric": item["metric"], "condition": item["condition"]}
        for one in completions_of(item):
            where.setdefault(key_of(item, one), place)
    verdicts = {
        path.stem: {
            record["key"]: record["outcome"] for record in read_records(path, StoredVerdict) if record["key"] in where
        }
        for path in sorted(folder.glob("*.jsonl"))
    }
    return [_compare(pair, verdicts[pair[0]], verdicts[pair[1]], where) for pair in combinations(verdicts, 2)]


def _compare(
    judges: tuple[str, str], first: Mapping[str, str], second: Mapping[str, str], where: Mapping[str, PlaceOf]
) -> Agreement:
    shared = [key for key in where if key in first and key in second]
    both = [key for key in shared if "not_judged" not in (first[key], second[key])]
    events = [(_event(first[key], where[key]), _event(second[key], where[key])) for key in both]
    agreed = sum(a == b for a, b in events)
    disagreements = [
        {**where[key], "key": key, judges[0]: first[key], judges[1]: second[key]}
        for key, (a, b) in zip(both, events, strict=True)
        if a != b
    ]
    return {
        "judges": list(judges),
        "n": len(both),
        "not_judged": len(shared) - len(both),
        "agreement": 100 * agreed / len(both) if both else None,
        "kappa": cohens_kappa([a for a, _ in events], [b for _, b in events]) if both else None,
        "disagreements": sorted(disagreements, key=lambda d: (d["metric"], d["condition"], d["subject"], d["id"])),
    }


def _event(outcome: str, place: PlaceOf) -> bool:
    return EVENTS.get(outcome) == ("harmful" if judged_as(place["metric"]) == "compliance" else "refused")
