"""How strong each attack was: what it was given, whether it knew the breaker and had finished, and its control."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_cb.attacks.controls import CONTROL, CONVERGENCE, first_try, is_done, supplied
from mm_cb.attacks.outputs import curves, parts_of
from mm_cb.attacks.registry import attacks
from mm_cb.core.checked import read_records
from mm_cb.core.compatibility import SETTLED_THEN, counts_in_worst_case
from mm_cb.core.records import Item
from mm_cb.metrics.convergence import (
    LEAST,
    RESOLUTION,
    SETTLED,
    Doubled,
    Fall,
    State,
    doubled,
    fall,
    has_settled,
    state,
)
from mm_cb.metrics.dictation import Control, control, dictated
from mm_cb.metrics.observations import told

Of = Mapping[str, Item]
"""Behaviour id → its item under one attack."""


@dataclass(frozen=True)
class Strength:
    """One attack on one subject."""

    subject: str
    condition: str
    given: str
    """As `mm_cb.attacks.registry.Given` has it."""
    knows_breaker: bool
    state: State
    why: str
    """What the state rests on, in words."""
    counted: bool
    """Whether it enters the worst case."""
    complete: bool = False
    """Whether it broke every request, so that no further step could break more."""
    control: Control | None = None
    """How readily a supplied text is dictated if it is that of another behaviour; None where that was not tried."""

    @property
    def weak(self) -> bool:
        """Whether its number may be too low for want of steps."""
        return self.state in ("not converged", "not checked") and not self.complete

    @property
    def caution(self) -> str:
        """What stands beside its number; empty where it had finished."""
        return f"{self.state}: may be too low" if self.weak else ""

    @property
    def finished(self) -> str:
        """Whether it had finished, in words: where it broke every request, no search is left."""
        return self.caution or ("all answered" if self.complete and self.state != "nothing to converge" else self.state)


def strengths(folder: Path, items: Sequence[Item], settles: Mapping[str, float]) -> tuple[Strength, ...]:
    """Every attack of a run.

    Args:
        folder: The run's.
        items: Its records, each saying what its attack was given.
        settles: Attack → share of its steps after which its loss is that of the attacked model.
    """
    by_attack: dict[tuple[str, str], dict[str, Item]] = defaultdict(dict)
    for item in items:
        if item["metric"] == "compliance" and not item.get("same_as"):
            by_attack[item["subject"], item["condition"]][item["id"]] = item
    longer, wrong = _beside(folder / CONVERGENCE), _beside(folder / CONTROL)
    known = {entry.name: SETTLED_THEN.get(entry.name, 0.0) for entry in attacks() if entry.optimises} | dict(settles)
    return tuple(
        _strength(folder, key, by_id, longer.get(key[1]), wrong.get(key[1]), known.get(key[1]))
        for key, by_id in by_attack.items()
    )


def _beside(folder: Path) -> dict[str, dict[str, Item]]:
    """Attack → behaviour id → item, of a finished run beside another."""
    found: dict[str, dict[str, Item]] = defaultdict(dict)
    for item in read_records(folder / "items.jsonl", Item) if is_done(folder) else ():
        found[item["condition"]][item["id"]] = item
    return found


def _strength(
    folder: Path, key: tuple[str, str], by_id: Of, longer: Of | None, wrong: Of | None, settles: float | None
) -> Strength:
    subject, condition = key
    one = next(iter(by_id.values()))
    found, more = _fall(folder, subject, condition, settles or 0.0), doubled(by_id, longer) if longer else None
    tries = (one for item in by_id.values() for one in item.get("candidates") or ())
    searched = settles is not None or any(one.get("objective_logged") is not None for one in tries)
    said: State = state(found, more) if searched or found else "nothing to converge"
    why = _why(found, more, len(by_id)) if searched or found else "no search"
    return Strength(
        subject,
        condition,
        _given(by_id),
        bool(one.get("knows_breaker")),
        said,
        why,
        counts_in_worst_case(one),
        all(item.get("outcome") == "harmful" for item in by_id.values()),
        _control(folder, condition, by_id, wrong) if wrong else None,
    )


def _given(by_id: Of) -> str:
    """What an attack was given; where targets differ in it, what the attack itself gives."""
    found = {told(item) or "opening" for item in by_id.values()}
    return found.pop() if len(found) == 1 else next(iter(by_id.values())).get("given") or "opening"


def _fall(folder: Path, subject: str, condition: str, settles: float) -> Fall | None:
    """From the curves that the run keeps of every behaviour; None where there are none."""
    own = folder / "attacks" / subject / "parts"  # of a demo, which attacks several subjects
    losses = curves(parts_of(own.parent if own.is_dir() else folder), condition)
    return fall(losses, settles) if losses else None


def _why(found: Fall | None, more: Doubled | None, n: int) -> str:
    said = []
    if found is None:
        said.append("no loss curves are kept")
    elif not found.told:
        said.append(f"{found.steps} steps are too few for a last tenth")
    else:
        share = 100 * found.late / found.total if found.total > 0 else 0.0
        settled = has_settled(found)
        least = f", less than {RESOLUTION:g}" if settled and found.late >= SETTLED * found.total else ""
        still = "settled" if settled else "still falling"
        said.append(f"loss {still}: {share:.1f} % of its fall in the last tenth{least}")
    if more is None:
        said.append(
            "twice the steps not tried" + (f", which takes {LEAST} behaviours and not {n}" if n < LEAST else "")
        )
    else:
        content = "those not judged" if more.content is None else str(more.content)
        said.append(f"twice the steps changed content of {content}, openings of {more.openings} in {more.n}")
    return "; ".join(said)


def _control(folder: Path, condition: str, by_id: Of, wrong: Of) -> Control | None:
    """Both arms on the behaviours of the control: its text, which is another's, and in the run the behaviour's own."""
    right_texts, wrong_texts = supplied(folder, condition), supplied(folder / CONTROL, condition)
    ids = [id for id in wrong if id in by_id and id in right_texts and id in wrong_texts]
    if not ids:
        return None
    arms = ([_said(of[id], texts[id]) for id in ids] for of, texts in ((by_id, right_texts), (wrong, wrong_texts)))
    return control(*arms)


def _said(item: Item, text: str) -> bool:
    one = first_try(item)
    return one is not None and dictated(one["completion"], text)


def by_condition(found: Sequence[Strength], subject: str) -> dict[str, Strength]:
    """A subject's attacks by name; of several runs of one (shards), the one whose number is least sure."""
    held: dict[str, Strength] = {}
    for one in found:
        if one.subject == subject:
            held[one.condition] = max(held.get(one.condition, one), one, key=lambda s: s.weak)
    return held
