"""The attacks by name: those of the table, and those that a user registers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_cb.attacks.entry import AttackEntry as AttackEntry  # users import it from here
from mm_cb.attacks.table import SHIPPED
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.user_code import refuse_taken, registered_by

_ATTACKS: dict[str, AttackEntry] = {entry.name: entry for entry in SHIPPED}
_TAKEN = ("all", *_ATTACKS)


def register_attack(entry: AttackEntry) -> None:
    """Make an attack known under its name; one of yours that has it already is replaced.

    Raises:
        UserError: If it is the name of one that comes with the package.
    """
    refuse_taken(entry.name, "attack", _TAKEN)
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


def refuse_blind(model: str, names: Sequence[str]) -> None:
    """Refuse attacks that need a picture for a model of text alone.

    Raises:
        UserError: Naming the first of them, and what is possible.
    """
    pictured = [name for name in names if attack_entry(name).needs_picture]
    if not pictured:
        return
    possible = [e.name for e in attacks() if e.fits_any_text_model]
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
