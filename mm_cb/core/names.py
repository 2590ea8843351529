"""Names that a user's file gives: ids and groups, which must differ by more than case and blanks."""

import unicodedata
from collections.abc import Iterable

from mm_cb.core.errors import UserError


def alike(name: str) -> str:
    """What two names have in common that differ by case or blanks alone."""
    return " ".join(name.split()).casefold()


class Ids:
    """The ids of a file so far."""

    def __init__(self, what: str) -> None:
        """Begin; ``what`` is what has the ids: "behaviour"."""
        self._what = what
        self._first: dict[str, tuple[str, str]] = {}

    def take(self, id: str, where: str) -> None:
        """Take one more.

        Raises:
            UserError: If it was taken before, or one that differs by case or blanks alone; names both places.
        """
        first, place = self._first.setdefault(alike(id), (id, where))
        if place == where:
            return
        came = "comes more than once" if first == id else f"differs from `{first}` by case or blanks alone"
        raise UserError(f"{where}: every {self._what} must have its own id, `{id}` {came}, first at {place}.")


def refuse_alike(key: str, names: Iterable[tuple[str, str]]) -> None:
    """Refuse groups that look the same, or differ by case or blanks alone: they would be counted apart.

    Args:
        key: What the file calls them: "split".
        names: Each record's, with its place.

    Raises:
        UserError: Naming two.
    """
    first: dict[str, tuple[str, str]] = {}
    for name, where in names:
        other, place = first.setdefault(alike(unicodedata.normalize("NFC", name)), (name, where))
        if other != name:
            raise UserError(
                f"{where}: `{key}` `{name}` differs from `{other}`, at {place}, by case, blanks or how a letter is "
                "encoded alone: write one of them in both."
            )
