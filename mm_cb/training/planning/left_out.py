"""Rows of the data that a run leaves out: noted as they are met, once, also over interruptions."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from mm_cb.core.checked import read_records
from mm_cb.core.files import append_jsonl
from mm_cb.data.examples import Example, OnUnreadable, PictureError

FILE = "unreadable.jsonl"
"""In the run's folder: one line for each example whose picture could not be read."""


class LeftOut(TypedDict):
    """One line of that file."""

    id: str
    source: str
    reason: str


def note_unreadable(out: Path) -> OnUnreadable:
    """What notes and warns of an example whose picture cannot be read."""
    known = {record["id"] for record in read_records(out / FILE, LeftOut)}

    def note(example: Example, error: PictureError) -> None:
        if example.id not in known:
            known.add(example.id)
            append_jsonl(out / FILE, {"id": example.id, "source": example.source, "reason": str(error)})
            warnings.warn(f"left out: {error}", stacklevel=2)

    return note


def reasons(examples: Sequence[Example], out: Path) -> dict[str, int]:
    """Why rows were not used, those of a mixture that never became examples included → how many."""
    counts: Counter[str] = Counter()
    for source, skipped in getattr(examples, "skipped", {}).items():
        counts.update({f"{source}: {reason}": count for reason, count in skipped.items()})
    found = {
        record["id"]: record["source"] for record in read_records(out / FILE, LeftOut)
    }  # several processes may note one
    counts.update(f"{source}: picture cannot be read" for source in found.values())
    return dict(counts)
