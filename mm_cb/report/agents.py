"""The page's part about agents: the numbers together, what answers were by rule, and calls whose arguments differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mm_cb.benchmarks.harmful_calls.answers import KINDS
from mm_cb.core.calls import FORMATS, Call, NotCalls
from mm_cb.core.records import Item
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.table import judged_as, metric
from mm_cb.report.gallery import ShownPicture, embedded_picture, read_picture
from mm_cb.report.labels import CALLS, CONDITIONS, label
from mm_cb.report.text import clean_text

_NUMBERS = (
    *[("harmful_calls", condition) for condition in ("no_attack", "forced_call")],
    *[("calls_made", condition) for condition in ("no_attack", "forced_call")],
    ("benign_calls", "strict"),
    ("function_calling_mean", "strict"),
    ("irrelevance", "strict"),
    ("irrelevance_broken", "strict"),
)
_ASKED = ("harmful_calls", "benign_calls")
_SUBJECTS = ("base", "base+safety_prompt", "rr")
_LISTED = 40


@dataclass(frozen=True)
class Piece:
    """A part of a call as code."""

    text: str
    differs: bool = False
    """Whether the other answer has another argument there."""


@dataclass(frozen=True)
class AgentAnswer:
    """One subject's answer to a request."""

    item: Item
    calls: tuple[tuple[Piece, ...], ...] | None
    """None where the page must not show it."""


@dataclass(frozen=True)
class AgentRequest:
    """One request and what the subjects did."""

    item: Item
    name: str
    """Condition, or that it is a harmless twin."""
    said: tuple[AgentAnswer, ...]
    screen: ShownPicture | None = None
    """What the agent was shown, small."""

    @property
    def differs(self) -> bool:
        """Whether the subjects did different things."""
        return len({(one.item.get("call"), str(one.item.get("parsed"))) for one in self.said}) > 1


@dataclass(frozen=True)
class Agents:
    """What the part shows."""

    numbers: list[tuple[str, tuple[Measurement | None, ...]]]
    """Label → one number a subject, None where it was not measured."""
    kinds: list[tuple[str, str, list[int], int]]
    """Condition, subject, how many answers of each kind, and of how many."""
    asked: list[AgentRequest]
    possible: int
    """Requests that might be listed."""


def agents(
    items: Sequence[Item], measurements: Sequence[Measurement], subjects: Sequence[str], *, show: bool
) -> Agents | None:
    """The part about agents; None where no run asked any.

    Args:
        items: Of all runs.
        measurements: Of all runs.
        subjects: The columns.
        show: Show also calls that may be harmful: a fictional world, or the user says so.
    """
    own = [item for item in items if item["metric"] in _ASKED]
    numbers = [(_label(*one), tuple(find(measurements, subject, *one) for subject in subjects)) for one in _NUMBERS]
    if not any(any(found) for _, found in numbers):
        return None
    kinds: dict[tuple[str, str], Counter[str]] = {}
    groups: dict[tuple[str, str, str], dict[str, Item]] = {}
    for item in own:
        kinds.setdefault((_name(item), item["subject"]), Counter())[str(item.get("call"))] += 1
        groups.setdefault((item["metric"], item["condition"], item["id"]), {})[item["subject"]] = item
    counted = [
        (name, subject, [found[kind] for kind in KINDS], found.total())
        for (name, subject), found in sorted(kinds.items(), key=lambda one: one[0][0])
    ]
    listed = sorted((_asked(group, show=show) for group in groups.values()), key=lambda one: not one.differs)
    seen = [
        replace(one, screen=_screen(one.item)) if show or one.item["metric"] == "benign_calls" else one
        for one in listed[:_LISTED]
    ]
    return Agents(numbers, counted, seen, len(listed))


def pieces(call: Call, others: Iterable[Call]) -> tuple[Piece, ...]:
    """A call as Python code, each argument that the other answer's call does not have so marked.

    Args:
        call: The call.
        others: Those of the other answer; the first of the same function is compared, and without one nothing is marked
            but the name.
    """
    other = next((one for one in others if one.name == call.name), None)
    found = [Piece(f"{clean_text(call.name)}(", other is None)]
    for place, (name, value) in enumerate(call.arguments.items()):
        same = other is None or (name in other.arguments and other.arguments[name] == value)
        found += [Piece(", ")] if place else []
        found.append(Piece(f"{clean_text(name)}={clean_text(repr(value))}", not same))
    return (*found, Piece(")"))


def target_pieces(item: Item) -> tuple[tuple[Piece, ...], ...]:
    """The call that an attack wanted, each argument marked that the answer's call has not; nothing of other targets."""
    wanted = _read(str(item.get("target") or ""))
    said = _read(item.get("completion") or "")
    return tuple(pieces(call, said) for call in wanted)


def _asked(group: dict[str, Item], *, show: bool) -> AgentRequest:
    subjects = sorted(group, key=lambda name: (_SUBJECTS.index(name) if name in _SUBJECTS else len(_SUBJECTS), name))
    read = {subject: _parsed(group[subject]) for subject in subjects}
    said = []
    for subject in subjects:
        item = group[subject]
        others = [call for other in subjects if other != subject for call in read[other]]
        known = (*others, *([] if others else read[subject]))
        calls = tuple(pieces(call, known) for call in read[subject])
        said.append(AgentAnswer(item, calls if show or not _withheld(item) else None))
    first = group[subjects[0]]
    return AgentRequest(first, _name(first), tuple(said))


def _screen(item: Item) -> ShownPicture | None:
    """The picture that a request was asked with."""
    pixels = read_picture(Path(str(item.get("run_dir"))), item.get("screen"))
    return embedded_picture(pixels)


def _withheld(item: Item) -> bool:
    """Whether a call may be harmful: to a forbidden request, and not judged to be anything else."""
    return judged_as(item["metric"]) == "compliance" and item.get("outcome") in (None, "not_judged", "harmful")


def _parsed(item: Item) -> list[Call]:
    """The calls that the run read in an answer; what is none of them is left out."""
    found = item.get("parsed") if isinstance(item.get("parsed"), list) else []
    told = [one for one in found or () if isinstance(one, dict) and isinstance(one.get("arguments"), dict)]
    return [Call(str(one.get("name")), one["arguments"]) for one in told]


def _read(text: str) -> list[Call]:
    for format in FORMATS.values():
        try:
            calls = format.read(text).calls
        except NotCalls as error:
            calls = list(error.calls)
        if calls:
            return calls
    return []


def _name(item: Item) -> str:
    return label(CONDITIONS, item["condition"]) if item["metric"] == "harmful_calls" else "harmless twin"


def _label(name: str, condition: str) -> str:
    text = metric(name).label
    return f"{text}, {label(CONDITIONS, condition)}" if name in ("harmful_calls", "calls_made") else text


def kind_labels() -> list[str]:
    """Heads of the table of kinds."""
    return [label(CALLS, kind) for kind in KINDS]
