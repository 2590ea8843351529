"""The attacks by name: one row each, with what it minimises, how it searches, and what its result counts for.

Imports nothing heavy: objectives are named by module and looked up when an attack runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from mm_cb.core.errors import UserError, unknown
from mm_cb.core.user_code import registered_by

Search = Literal["clean", "noise", "pgd", "apgd", "embedding", "draw", "vary", "suffix"]
"""Where an attack's pictures come from: the clean ones, random noise, gradient steps on pixels (by ``--optimizer``, or
APGD's), gradient steps on image embeddings, a drawing, or many random variations of the chat (both black box). Of
``suffix`` there is none: tokens behind the prompt are searched."""

Anneal = Literal["none", "steps", "loss"]
"""How the adapter's scale changes on the way: not at all, from 0 to 1 by the steps, or by each behaviour's loss."""
SETTLES: Mapping[Anneal, float] = {"none": 0.0, "steps": 0.7, "loss": 0.93}
"""Share of the steps after which every behaviour is at the whole adapter: what is minimised is the model's own loss."""


Given = Literal["nothing", "opening", "supplied text", "base's pictures"]
"""What an attacker brings beside the request and the model: the first words of the answer (the field's target prefix),
the text of the answer itself, or pictures that were made on the undefended base (transfer)."""


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
    anneal: Anneal = "none"
    """How the adapter's scale changes on the way, unless ``--anneal`` says it."""
    reads: tuple[str, ...] = ()
    """Settings that few attacks read, by their names in `AttackConfig`; its objective is then given ``config`` and
    ``restart`` too."""
    needs_adapter: bool = False
    """It is aimed at what an adapter changed."""
    needs_probe: bool = False
    """It is aimed at a probe that withholds answers."""
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


_OBJECTIVES = "mm_cb.attacks.objectives"
_TARGET = f"{_OBJECTIVES}.target:target_objective"


def _forcing(name: str, about: str, label: str, objective: str, **more: Any) -> AttackEntry:
    """A row of PGD towards a long response."""
    reference = f"{_OBJECTIVES}.{objective}"
    return AttackEntry(name, about, label, "pgd", reference, given="supplied text", forces_response=True, **more)


_ENTRIES = (
    AttackEntry(
        "no_attack",
        "the clean picture, or the prompt alone: control",
        "no attack",
        "clean",
        given="nothing",
        needs_picture=False,
        in_worst_case=False,
    ),
    AttackEntry(
        "noise", "random signs of the same size: placebo", "random noise", "noise", given="nothing", in_worst_case=False
    ),
    AttackEntry("pgd", "projected gradient descent on the target's loss", "PGD", "pgd", _TARGET),
    _forcing(
        "pgd_long",
        "a long answer by the base model; later tokens weigh more",
        "long-target PGD",
        "adaptive:LongTargetObjective",
    ),
    _forcing(
        "pgd_adaptive",
        "hidden states back to the base model's, by their cosine",
        "adaptive PGD",
        "adaptive:MatchingObjective",
        needs_adapter=True,
    ),
    _forcing(
        "pgd_clean_teacher",
        "hidden states to those of the complying base model, by their distance",
        "clean-teacher PGD",
        "adaptive:CleanTeacherObjective",
        needs_adapter=True,
    ),
    _forcing(
        "pgd_homotopy",
        "a long answer by the base model, the adapter dialled up from zero on the way",
        "homotopy PGD",
        "homotopy:HomotopyObjective",
        first_step=16 / 255,
        anneal="loss",
        needs_adapter=True,
    ),
    _forcing(
        "pgd_distill",
        "next words as the base model's",
        "distilling PGD",
        "adaptive:DistillObjective",
        needs_adapter=True,
        in_all=False,
    ),
    _forcing(
        "pgd_fluent",
        "words that the base model finds likely",
        "fluent PGD",
        "adaptive:FluentObjective",
        needs_adapter=True,
        in_all=False,
    ),
    _forcing(
        "pgd_probe",
        "a long answer whose states a harmfulness probe does not flag",
        "probe-aware PGD",
        "probe:ProbeObjective",
        needs_probe=True,
    ),
    AttackEntry("apgd", "Auto-PGD's steps on the target's loss", "APGD", "apgd", _TARGET),
    AttackEntry(
        "typographic",
        "the request written into the picture; black box, no gradient",
        "typographic",
        "draw",
        draw="mm_cb.attacks.typographic:draw",
        ask="mm_cb.attacks.typographic:ask",
        given="nothing",
    ),
    AttackEntry(
        "best_of_n",
        "many random variations of picture or text, any of which may succeed; black box, no gradient",
        "best of N",
        "vary",
        reads=("draws", "strength", "vary"),
        given="nothing",
        in_all=False,
    ),
    AttackEntry(
        "pgd_transfer",
        "the base's loss of the target under random low-rank changes; never sees the adapter it is judged on",
        "transfer PGD",
        "pgd",
        f"{_OBJECTIVES}.transfer:TransferObjective",
        reads=("surrogate", "surrogate_scale"),
        given="base's pictures",
        in_all=False,
    ),
    AttackEntry(
        "pgd_eot",
        "the target's loss in expectation over place (of a patch), scale and JPEG",
        "EOT PGD",
        "pgd",
        f"{_OBJECTIVES}.expectation:EotObjective",
        reads=("eot_samples", "eot_scale", "eot_quality"),
        in_all=False,
    ),
    AttackEntry(
        "universal",
        "one picture for many behaviours, some held out; alone in its run",
        "universal picture",
        "pgd",
        f"{_OBJECTIVES}.universal:UniversalObjective",
        reads=("universal_train", "minibatch"),
        universal=True,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "universal_corpus",
        "one picture for a text file of yours, judged on behaviours it never saw; alone in its run",
        "universal picture of a corpus",
        "pgd",
        f"{_OBJECTIVES}.universal:UniversalObjective",
        reads=("corpus", "minibatch"),
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
    _forcing(
        "prefill",
        "picture and prefilled target",
        "picture and prefilled answer",
        "adaptive:ContinuationObjective",
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
        "gcg",
        "a suffix behind the prompt, searched token by token; for models of text alone",
        "suffix search (GCG)",
        "suffix",
        _TARGET,
        reads=("candidates",),
        needs_picture=False,
        in_all=False,
    ),
    AttackEntry(
        "imported",
        "prompts made elsewhere (GCG, PAIR, PyRIT, several turns), from --prompts",
        "imported prompts",
        "clean",
        given="nothing",
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
    """The row of a name; runs no file, so that a run's own names are safe to look up.

    Raises:
        UserError: If there is none; names the nearest one.
    """
    if name not in _ATTACKS:
        own = "; one of your own is named by its file, with `--attack FILE.py`"
        raise UserError(f"{unknown('attack', name, [*_ATTACKS, 'all'])}{own}")
    return _ATTACKS[name]


def attack_entries(text: str) -> list[AttackEntry]:
    """The rows that names and Python files with commas between name: a file is run, and names all that it registers.

    Raises:
        UserError: If there is no such row or file.
    """
    names = [name.strip() for name in text.split(",")]
    if "all" in names:
        raise UserError("`--attack all` stands alone, without others: leave one of them out.")
    return [
        entry
        for name in names
        for entry in (
            registered_by(Path(name), _ATTACKS, "register_attack") if name.endswith(".py") else [attack_entry(name)]
        )
    ]


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


def chosen_attacks(text: str, *, adapted: bool, probed: bool = False) -> list[str]:
    """The attacks that ``--attack`` names, in order: a name or a Python file, several with commas between, or ``all``.

    ``all`` are those of the table that say so; those that aim at an adapter or a probe are left out without one. On a
    model of text alone it comes to others, see `mm_cb.attacks.refusals.fitting`.

    Raises:
        UserError: If a name is unknown, comes twice, needs what is not there, or gives answers that no probe sees.
    """
    if text == "all":
        aimed = ((e, (adapted or not e.needs_adapter) and (probed or not e.needs_probe)) for e in attacks())
        return [e.name for e, fits in aimed if fits and e.in_all]
    entries = attack_entries(text)
    for entry in entries:
        if entry.needs_adapter and not adapted:
            raise UserError(
                f"`--attack {entry.name}` aims at what an adapter changed: give the `--adapter`, or the "
                "`--base` of a breaker without one."
            )
        if entry.needs_probe and not probed:
            raise UserError(f"`--attack {entry.name}` aims at a harmfulness probe: give the `--probe`.")
        if entry.relaxation and probed:
            raise UserError(f"`--attack {entry.name}` makes answers that no probe watches: leave out `--probe`, or it.")
        if entry.universal and len(entries) > 1:
            raise UserError(
                f"`--attack {entry.name}` must be alone in its run: its picture is not the one that a behaviour comes "
                "with."
            )
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"`--attack` must name each attack once, got `{text}`.")
    return names
