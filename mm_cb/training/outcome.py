"""Whether a run took hold: circuit-breaker states went, retain states stayed; and if not, which setting moves it."""

from collections.abc import Mapping
from typing import NamedTuple

from mm_cb.training.registry import Hold, LossEntry

KEPT = Hold("cosine", above=0.9)
"""Held-out retain rows where they stayed."""
ENOUGH_STEPS = 50
"""A run of so many steps should have taken hold; a shorter one may be a try."""
WHAT_COSINE_SAYS = (
    "Cosine between hidden states with the adapter and without it, on rows never trained on. 1 is unchanged: "
    "circuit-breaker rows are to lose it (low is good, 0 or below is best), retain rows to keep it (near 1 is good)."
)
STUCK = "stuck"
"""Key in the last line of metrics.jsonl of a run that did not."""


class DidNotTakeHold(UserWarning):
    """A training run that came to its end without effect, or with too much of it."""


class Levers(NamedTuple):
    """The settings that decide whether rerouting gets away from its start, and what it takes along."""

    retain_scale: str
    start_distance: float
    schedule_steps: int
    max_steps: int
    learning_rate: float
    openings_rerouted: bool = False
    """Whether tokens that rows of both sets begin with are rerouted."""


def not_rerouted(loss: LossEntry, record: Mapping[str, float | str], levers: Levers) -> str | None:
    """What is wrong with held-out circuit-breaker rows and what to set; None where nothing is."""
    found = _miss("circuit_breaker", loss.hold, record)
    return None if found is None else f"nothing was rerouted: {found}; set {_loosen(levers)}"


def not_kept(record: Mapping[str, float | str], levers: Levers) -> str | None:
    """The same of held-out retain rows."""
    found = _miss("retain", KEPT, record)
    if found is None:
        return None
    if levers.openings_rerouted:
        return f"retain states were not kept: {found}; set circuit_breaker.shared_openings=left_out"
    return f"retain states were not kept: {found}; set training.learning_rate={levers.learning_rate / 2:g} or lower"


def outcome(loss: LossEntry, record: Mapping[str, float | str], levers: Levers) -> str | None:
    """Both, of the record of a run's last step."""
    found = [text for text in (not_rerouted(loss, record, levers), not_kept(record, levers)) if text]
    return ", and ".join(found) or None


def _miss(rows: str, hold: Hold, record: Mapping[str, float | str]) -> str | None:
    value = float(record[f"held_out_{rows}_{hold.measure}"])
    if hold.holds(value):
        return None
    name = f"{hold.measure.replace('_', ' ')} of held-out {rows.replace('_', '-')} rows"
    return f"after step {record['step']} the {name} is {value:.4g}, {hold.expected} is expected"


def _loosen(levers: Levers) -> str:
    """What keeps the retain loss from holding states at their start, the surest first."""
    moves = []
    if levers.retain_scale == "absolute":
        moves.append("circuit_breaker.retain_scale=relative")
    if not levers.start_distance:
        moves.append("training.start_distance=0.15")
    if moves:
        return " ".join(moves)
    if levers.schedule_steps < 4 * levers.max_steps:
        return f"circuit_breaker.schedule_steps={10 * levers.max_steps}"
    return f"training.learning_rate={3 * levers.learning_rate:g}"
