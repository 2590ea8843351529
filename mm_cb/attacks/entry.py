"""One row of the table of attacks: what it minimises, how it searches, and what its result counts for.

Imports nothing heavy: objectives are named by module and looked up when an attack runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Search = Literal["clean", "noise", "pgd", "apgd", "embedding", "draw", "vary", "suffix"]
"""Where an attack's pictures come from: the clean ones, random noise, gradient steps on pixels (by ``--optimizer``, or
APGD's), gradient steps on image embeddings, a drawing, or many random variations of the chat (both black box). Of
``suffix`` there is none: tokens behind the prompt are searched."""

Anneal = Literal["none", "steps", "loss"]
"""How the adapter's scale changes on the way: not at all, from 0 to 1 by the steps, or by each behaviour's loss."""
SETTLES: Mapping[Anneal, float] = {"none": 0.0, "steps": 0.7, "loss": 0.93}
"""Share of the steps after which every behaviour is at the whole adapter: what is minimised is the model's own loss."""


Given = Literal["nothing", "opening", "form and words", "supplied text", "base's pictures"]
"""What an attacker brings beside the request and the model: the first words of the answer (the field's target prefix),
how an answer is said and words of which some belong into it, the text of the answer itself, or pictures that were made
on the undefended base (transfer)."""


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
    optimizer: Callable[..., Any] | None = None
    """For search ``pgd``: how it steps, called as `image_attacks.pgd` is, in place of ``--optimizer``."""
    draw: str | Callable[..., Any] | None = None
    """For search ``draw``: ``(behavior, (height, width)) -> PIL picture``."""
    ask: str | Callable[..., Any] | None = None
    """``behavior -> prompt`` where the attack sends another prompt than the behaviour's."""
    first_step: float | None = None
    """First step of a search by PGD in [0, 1] units per value, from which it falls by a cosine; None = as the threat
    model has it, geometrically."""
    anneal: Anneal = "none"
    """How the adapter's scale changes on the way, unless ``--anneal`` says it."""
    reads: tuple[str, ...] = ()
    """Settings that few attacks read, by their names in `AttackConfig`; its objective is then given ``config`` and
    ``restart`` too."""
    needs_adapter: bool = False
    """It is aimed at what an adapter changed."""
    needs_probe: bool = False
    """It is aimed at a probe that withholds answers."""
    fields: tuple[str, ...] = ()
    """Fields of the behaviours' lines that it reads beside prompt, target and picture: every line must have them."""
    given: Given = "opening"
    """What it was given; success with supplied text alone shows control over the output, not knowledge."""
    forces_response: bool = False
    """It pushes towards a long response behind the target, written by the base model or a hijack of it: a supplied
    text, which its control swaps for that of another behaviour."""
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

    def __post_init__(self) -> None:
        """Check that a forced response is called supplied text.

        Raises:
            ValueError: If it is not.
        """
        if self.forces_response and self.given != "supplied text":
            raise ValueError(
                f"attack `{self.name}` forces a response, which is text that it was given: say "
                f'`given="supplied text"`, got {self.given!r}.'
            )

    @property
    def optimises(self) -> bool:
        """Whether it minimises anything."""
        return self.objective is not None

    @property
    def aimed(self) -> bool:
        """Whether it has a term against what defends the model, an adapter or a probe."""
        return self.needs_adapter or self.needs_probe

    @property
    def fits_any_text_model(self) -> bool:
        """Whether it needs neither a picture nor a probe, nor a file of prompts."""
        return not (self.needs_picture or self.needs_probe or self.imported)

    @property
    def searches_pixels(self) -> bool:
        """Whether a picture is optimised step by step, so that it has iterates and can start another attack."""
        return self.search in ("pgd", "apgd")

    @property
    def can_anneal(self) -> bool:
        """Whether ``--anneal`` is for it: Auto-PGD's steps follow from losses of one model, transfer sees the base."""
        return self.search == "pgd" and "surrogate" not in self.reads

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
        """Whether its pictures lie in the set that ``--norm`` allows; drawings and variations lie where they lie."""
        return self.search not in ("draw", "vary")


def resolved(reference: str | Callable[..., Any] | None) -> Any:
    """The object that a row names as ``"module:name"``; anything else as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
