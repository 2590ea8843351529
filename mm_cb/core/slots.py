"""Places in prompt templates of the user's: ``{name}`` in one pair of braces, and nothing that only looks like it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mm_cb.core.errors import UserError


def refuse_other_braces(template: str, names: Iterable[str], where: str) -> None:
    """Refuse what other tools' templates mean by braces: here it would be sent as it stands.

    Args:
        template: The text.
        names: Of its places.
        where: What the error calls it.

    Raises:
        UserError: If two braces open at once (``{{name}}``, ``{{"a": 1}}``), or blanks stand around a place's name.
    """
    if doubled := re.search(r"\{\{.{0,30}", template):
        raise UserError(
            f"{where} must hold its braces once, got `{doubled[0]}`: a place is {{name}}, all other braces are sent as "
            "they stand; write one, or a blank between two that are meant."
        )
    known = set(names)
    for spaced in re.findall(r"\{(\s*\w+\s*)\}", template):
        if spaced.strip() in known and spaced not in known:
            raise UserError(f"{where} must hold its places without blanks in them, as {{{spaced.strip()}}}.")
