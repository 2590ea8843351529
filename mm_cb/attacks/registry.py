"""The attacks by name: one row each, with what it minimises, how it searches, and what its result counts for.

Imports nothing heavy: objectives are named by module and looked up when an attack runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from mm_cb.core.errors import UserError
from mm_cb.core.user_code import entry_of

Search = Literal["clean", "noise", "pgd", "apgd", "embedding", "draw"]
"""Where an attack's pictures come from: the clean ones, random noise, gradient steps on pixels (by ``--optimizer``, or
APGD's), gradient steps on image embeddings, or a drawing (black box, no gradient)."""


@dataclass(frozen=True)
class AttackEntry:
    """One row of the table."""

    name: str
    about: str
    """One line for lists."""
    label: str
    """What tables and pages call it."""
    search: Search
    objective: str | Callable[..., Any] | None = None
    """What is minimised: a class or function called as `AdaptiveObjective` is, or its ``"module:name"``; None where
    nothing is. What files are held to is the target's loss in any case."""
    draw: str | Callable[..., Any] | None = None
    """For search ``draw``: ``(behavior, (height, width)) -> PIL picture``."""
    ask: str | Callable[..., Any] | None = None
    """``behavior -> prompt`` where the attack sends another prompt than the behaviour's."""
    first_step: float | None = None
    """First step of a search by PGD in [0, 1] units per value, from which it falls by a cosine; None = as the threat
    model has it, geometrically."""
    needs_adapter: bool = False
    """It is aimed at what an adapter changed."""
    forces_response: bool = False
    """It pushes towards a long response behind the target, written by the base model or a hijack of it."""
    prefilled: bool = False
    """The answer is generated behind the target, which the attacker writes himself."""
    universal: bool = False
    """One picture for many behaviours, of which some are held out; alone in its run."""
    needs_picture: bool = True
    """Whether there must be a picture to attack or to show; models of text alone are attacked by the others."""
    imported: bool = False
    """It sends the chats of ``--prompts`` as they are, one after the other, in place of the behaviour's prompt."""
    in_worst_case: bool = True
    """Whether ``worst_case`` counts it: not controls, nor what needs more than the behaviour's own picture."""
    in_all: bool = True
    """Whether ``--attack all`` runs it."""

    @property
    def optimises(self) -> bool:
        """Whether it minimises anything."""
        return self.objective is not None

    @property
    def searches_pixels(self) -> bool:
        """Whether a picture is optimised step by step, so that it has iterates and can start another attack."""
        return self.search in ("pgd", "apgd")

    @property
    def changes_picture(self) -> bool:
        """Whether ``--norm`` and ``--epsilon`` bound its pictures: steps on pixels, and their placebo."""
        return self.searches_pixels or self.search == "noise"

    @property
    def relaxation(self) -> bool:
        """Whether it leaves no picture that a user could send: it bounds what is left, and is never a headline."""
        return self.search == "embedding"

    @property
    def stays_in_threat(self) -> bool:
        """Whether its pictures lie in the set that ``--norm`` allows; a drawing is a picture of its own."""
        return self.search != "draw"


def resolved(reference: str | Callable[..., Any] | None) -> Any:
    """The object that a row names as ``"module:name"``; anything else as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


_OBJECTIVES = "mm_cb.attacks.objectives"
_TARGET = f"{_OBJECTIVES}.target:target_objective"


def _adaptive(name: str) -> str:
    return f"{_OBJECTIVES}.adaptive:{name}"


_ENTRIES = (
    AttackEntry(
        "no_attack",
        "the clean picture, or the prompt alone: control",
        "no attack",
        "clean",
        needs_picture=False,
        in_worst_case=False,
    ),
    AttackEntry("noise", "random signs of the same size: placebo", "random noise", "noise", in_worst_case=False),
    AttackEntry("pgd", "projected gradient descent on the target's loss", "PGD", "pgd", _TARGET),
    AttackEntry(
        "pgd_long",
        "a long answer by the base model; later tokens weigh more",
        "long-target PGD",
        "pgd",
        _adaptive("LongTargetObjective"),
        forces_response=True,
    ),
    AttackEntry(
        "pgd_adaptive",
        "hidden states back to the base model's, by their cosine",
        "adaptive PGD",
        "pgd",
        _adaptive("MatchingObjective"),
        needs_adapter=True,
        forces_response=True,
    ),
    AttackEntry(
        "pgd_clean_teacher",
        "hidden states to those of the complying base model, by their distance",
        "clean-teacher PGD",
        "pgd",
        _adaptive("CleanTeacherObjective"),
        needs_adapter=True,
        forces_response=True,
    ),
    AttackEntry(
        "pgd_homotopy",
        "a long answer by the base model, the adapter dialled up from zero on the way",
        "homotopy PGD",
        "pgd",
        "mm_cb.attacks.objectives.homotopy:HomotopyObjective",
        first_step=16 / 255,
        needs_adapter=True,
        forces_response=True,
    ),
    AttackEntry(
        "pgd_distill",
        "next words as the base model's",
        "distilling PGD",
        "pgd",
        _adaptive("DistillObjective"),
        needs_adapter=True,
        forces_response=True,
        in_all=False,
    ),
    AttackEntry(
        "pgd_fluent",
        "words that the base model finds likely",
        "fluent PGD",
        "pgd",
        _adaptive("FluentObjective"),
        needs_adapter=True,
        forces_response=True,
        in_all=False,
    ),
    AttackEntry("apgd", "Auto-PGD's steps on the target's loss", "APGD", "apgd", _TARGET),
    AttackEntry(
        "typographic",
        "the request written into the picture; black box, no gradient",
        "typographic",
        "draw",
        draw="mm_cb.attacks.typographic:draw",
        ask="mm_cb.attacks.typographic:ask",
    ),
    AttackEntry(
        "universal",
        "one picture for many behaviours, some held out; alone in its run",
        "universal picture",
        "pgd",
        f"{_OBJECTIVES}.universal:UniversalObjective",
        universal=True,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "prefill_only",
        "nothing changed but that the target is prefilled: control",
        "prefilled answer",
        "clean",
        prefilled=True,
        needs_picture=False,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "prefill",
        "picture and prefilled target",
        "picture and prefilled answer",
        "pgd",
        _adaptive("ContinuationObjective"),
        forces_response=True,
        prefilled=True,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "embedding",
        "embeddings of the picture, or of the prompt where there is none: a relaxation that no input reaches",
        "embedding relaxation",
        "embedding",
        f"{_OBJECTIVES}.embedding:embedding_objective",
        needs_picture=False,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "imported",
        "prompts made elsewhere (GCG, PAIR, PyRIT, several turns), from --prompts",
        "imported prompts",
        "clean",
        needs_picture=False,
        imported=True,
        in_all=False,
    ),
)
_ATTACKS: dict[str, AttackEntry] = {entry.name: entry for entry in _ENTRIES}


def register_attack(entry: AttackEntry) -> None:
    """Make an attack known under its name; a name that is there already is replaced."""
    _ATTACKS[entry.name] = entry


def attack_entry(name: str) -> AttackEntry:
    """The row of a name, or of a Python file that registers one.

    Raises:
        UserError: If there is none; names the nearest one.
    """
    return entry_of(name, "attack", _ATTACKS, also=["all"])


def attacks() -> list[AttackEntry]:
    """All rows, in the order of the table."""
    return list(_ATTACKS.values())


def attack_names() -> list[str]:
    """All names, in the order of the table."""
    return list(_ATTACKS)


def refuse_blind(model: str, names: Sequence[str]) -> None:
    """Refuse attacks that need a picture for a model of text alone.

    Raises:
        UserError: Naming the first of them, and what is possible.
    """
    pictured = [name for name in names if attack_entry(name).needs_picture]
    if not pictured:
        return
    possible = [e.name for e in attacks() if not e.needs_picture and not e.imported]
    raise UserError(
        f"`--attack {pictured[0]}` needs a model that sees pictures, `{model}` is a model of text alone; possible are "
        f"`--attack {','.join(possible)}` and `--attack imported` with `--prompts FILE`."
    )


def chosen_attacks(text: str, *, adapted: bool) -> list[str]:
    """The attacks that ``--attack`` names, in order: a name or a Python file, several with commas between, or ``all``.

    ``all`` are those of the table that say so; without an adapter the ones that aim at it are left out.

    Raises:
        UserError: If a name is unknown, comes twice, or needs an adapter that is not there.
    """
    if text == "all":
        return [e.name for e in attacks() if e.in_all and (adapted or not e.needs_adapter)]
    entries = [attack_entry(name.strip()) for name in text.split(",")]
    for entry in entries:
        if entry.needs_adapter and not adapted:
            raise UserError(f"`--attack {entry.name}` aims at what an adapter changed: give the `--adapter` to attack.")
        if entry.universal and len(entries) > 1:
            raise UserError(
                f"`--attack {entry.name}` must be alone in its run: its picture is not the one that a behaviour comes "
                "with."
            )
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"`--attack` must name each attack once, got `{text}`.")
    return names
