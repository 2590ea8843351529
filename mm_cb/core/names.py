"""Names that a user's file gives: ids and groups, which must differ by more than case and blanks."""

import itertools
from collections.abc import Sequence

from mm_cb.core.errors import UserError
from mm_cb.core.folding import as_drawn
from mm_cb.core.reading import Line


def alike(name: str) -> str:
    """What two names have in common that differ by case, blanks or how their letters are encoded alone."""
    return " ".join(as_drawn(as_drawn(name).casefold()).split())


class Ids:
    """The ids of a file so far."""

    def __init__(self, what: str) -> None:
        """Begin; ``what`` is what has the ids: "behaviour"."""
        self._what = what
        self._first: dict[str, tuple[str, str]] = {}

    def take(self, id: str, where: str) -> None:
        """Take one more.

        Raises:
            UserError: If it was taken before, or one that looks the same; names both places.
        """
        first, place = self._first.setdefault(alike(id), (id, where))
        if place == where:
            return
        came = (
            "comes more than once"
            if first == id
            else f"differs from `{first}` by case, blanks or how a letter is encoded alone"
        )
        raise UserError(f"{where}: every {self._what} must have its own id, `{id}` {came}, first at {place}.")


_COUNTED = ("all", "trained_kinds", "made_for", "picture_held_out")
"""Rows that are counted whatever a file calls its groups: of everything, of kinds, of universal pictures."""


def refuse_groups(lines: Sequence[Line], keys: Sequence[str]) -> None:
    """Refuse groups that would be counted together, or apart, though their names say otherwise.

    Those that look the same, or differ by case or blanks alone, would be counted apart; one that has the name of a row
    that is counted anyway, or of a group under another key, would be counted with it.

    Args:
        lines: What the file says, with the places.
        keys: Under which a group may stand: "split".

    Raises:
        UserError: Naming two.
    """
    for key in keys:
        named = [(str(line.values[key]), line.where) for line in lines if line.values.get(key) is not None]
        first: dict[str, tuple[str, str]] = {}
        for name, where in named:
            other, place = first.setdefault(alike(name), (name, where))
            if other != name:
                raise UserError(
                    f"{where}: `{key}` `{name}` differs from `{other}`, at {place}, by case, blanks or how a letter is "
                    "encoded alone: write one of them in both."
                )
        taken = next((one for one in named if alike(one[0]) in _COUNTED), None)
        if taken and {name for name, _ in named} != {"all"}:
            raise UserError(
                f"{taken[1]}: `{key}` `{taken[0]}` is the name of a row that is counted anyway: give the group another "
                "name, or leave it out where there is none."
            )
    refuse_merged(lines, keys)


def refuse_merged(lines: Sequence[Line], keys: Sequence[str]) -> None:
    """Refuse one name under two keys for groups that are not the same: both would be counted as one.

    Raises:
        UserError: Naming a place of each.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        for key in keys:
            found.setdefault(line.values.get(key) or "all", {}).setdefault(key, []).append(line.where)
    found.pop("all", None)
    for name, places in found.items():
        for one, other in itertools.permutations(places, 2):
            if alone := dict.fromkeys(places[one]).keys() - places[other]:
                raise UserError(
                    f"{min(alone, key=places[one].index)}: `{one}` `{name}` is a `{other}` too, of other rows, at "
                    f"{places[other][0]}; both would be counted as one group: give one of them another name."
                )
