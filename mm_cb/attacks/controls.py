"""Control runs beside an attack run, in folders of its own: at twice the steps, and with the wrong text supplied.

Neither enters a rate. Both are attack runs themselves, so that `mm-cb judge`, `mm-cb attack verify` and resuming know
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import as_recipe
from mm_cb.attacks.records import Artefact
from mm_cb.core.checked import read_record, read_records
from mm_cb.core.places import RUN
from mm_cb.core.records import Candidate, Item, JsonObject, RecipeFields
from mm_cb.core.runs import read_run
from mm_cb.data.behaviors_file import FACTS, Behavior
from mm_cb.metrics.convergence import LEAST

CONVERGENCE, CONTROL = "convergence", "control"
"""Folders in the run's own."""


@dataclass(frozen=True)
class ControlRun:
    """A control run beside an attack run."""

    folder: str
    about: str
    configs: Sequence[AttackConfig]
    behaviors: Sequence[Behavior]
    responses: Mapping[str, str] | None

    def recipe(self, beside: RecipeFields) -> JsonObject:
        """Its recipe, from that of the run that it stands beside."""
        own = as_recipe(self.configs[0], [config.name for config in self.configs])
        return {**beside, **own, "beside": {"what": self.folder, "behaviors": len(self.behaviors)}}

    def kept(self) -> list[JsonObject]:
        """The lines of its behaviours file."""
        return [
            {
                **{"id": b.id, "prompt": b.prompt, "target": b.target, "image": b.image and b.image.name},
                **{"category": b.category, "split": b.split, **b.extra},
            }
            for b in self.behaviors
        ]


def is_done(folder: Path) -> bool:
    """Whether a run beside another has finished, on however many behaviours."""
    return (folder / RUN).is_file() and bool(read_run(folder).get("ended"))


def twice_the_steps(
    configs: Sequence[AttackConfig], behaviors: Sequence[Behavior], responses: Mapping[str, str] | None
) -> ControlRun | None:
    """The attacks that step and enter the worst case, each with twice the steps; None where the rule asks for more.

    Args:
        configs: The run's attacks.
        behaviors: All of the run's.
        responses: Texts that a hijack gave, as the run had them.
    """
    first = configs[0]
    again = [replace(c, steps=2 * c.steps) for c in configs if c.entry.optimises and c.entry.in_worst_case]
    if not again or not first.check_convergence or len(behaviors) < LEAST:
        return None
    chosen = drawn(behaviors, first.check_convergence, first.seed)
    return ControlRun(CONVERGENCE, f"{2 * first.steps} steps", again, chosen, responses)


def wrong_text(configs: Sequence[AttackConfig], behaviors: Sequence[Behavior], folder: Path) -> ControlRun | None:
    """The attacks that were given a text, each with that of another behaviour; None where there are not two texts.

    Args:
        configs: The run's attacks.
        behaviors: All of the run's.
        folder: The finished run, which says what text was supplied.
    """
    first = configs[0]
    forced = [
        replace(c, restarts=1, iterates=0, samples=0, temperature=1.0, early_stop=False, chain=False, hijacks=None)
        for c in configs
        if c.entry.forces_response
    ]
    if not forced or not first.control:
        return None
    texts = supplied(folder, forced[0].name)
    known = [b for b in behaviors if b.id in texts]
    chosen = drawn(known, first.control, first.seed)
    pairs = [(own, other) for own, other in swapped(chosen, first.seed) if texts[own.id] != texts[other.id]]
    if not pairs:
        return None
    asked = [replace(own, target=other.target, extra={**own.extra, **_facts(other)}) for own, other in pairs]
    return ControlRun(
        CONTROL, "the text of another behaviour", forced, asked, {own.id: texts[o.id] for own, o in pairs}
    )


def _facts(behavior: Behavior) -> dict[str, str]:
    return {} if behavior.facts is None else {FACTS: behavior.facts}


def drawn(behaviors: Sequence[Behavior], count: int, seed: int) -> list[Behavior]:
    """So many of them at random, in their order; all if there are no more."""
    rng = np.random.default_rng([seed, len(behaviors)])
    chosen = rng.permutation(len(behaviors))[:count]
    return [behaviors[i] for i in sorted(chosen.tolist())]


def swapped(behaviors: Sequence[Behavior], seed: int) -> list[tuple[Behavior, Behavior]]:
    """Each with another one, by a fixed permutation: of another category where that can be, never of the same target.

    The permutation shifts a shuffled list by as many places as give the most pairs that differ.
    """
    n = len(behaviors)
    order = [behaviors[i] for i in np.random.default_rng([seed, n, 1]).permutation(n)]
    shifts = [list(zip(order, order[k:] + order[:k], strict=True)) for k in range(1, n)]
    differ = [(sum(a.target != b.target for a, b in s), sum(a.category != b.category for a, b in s)) for s in shifts]
    if not shifts:
        return []
    best = shifts[max(range(len(shifts)), key=differ.__getitem__)]
    place = {behavior.id: i for i, behavior in enumerate(behaviors)}
    return sorted(((a, b) for a, b in best if a.target != b.target), key=lambda pair: place[pair[0].id])


def supplied(folder: Path, attack: str) -> dict[str, str]:
    """Behaviour id → the text that an attack of a run supplied, as the JSON beside its pictures has it."""
    items = (item for item in read_records(folder / "items.jsonl", Item) if item["condition"] == attack)
    files = {item["id"]: first["image"] for item in items if (first := first_try(item)) is not None}
    told = {id: (folder / str(image)).with_suffix(".json") for id, image in files.items() if image is not None}
    found = {id: read_record(path, Artefact).get("response") for id, path in told.items() if path.is_file()}
    return {id: text for id, text in found.items() if text is not None}


def first_try(item: Item) -> Candidate | None:
    """The greedy answer to the selected picture of an item's first run: what a run of one try would have given."""
    tries = item.get("candidates") or ()
    return next((c for c in tries if not c.get("restart") and c.get("iterate") is None and not c.get("sample")), None)
