"""Errors that the user can fix, each one line: what was expected, what came, what to do."""

import difflib
from collections.abc import Iterable

_LISTED = 30
LONGEST = 1200
"""Characters of a message: what it quotes may be of any length."""
_END = 300


class UserError(Exception):
    """Something the user can put right: the command line prints it as one line and exits with code 2.

    The message is folded to one line, stripped of control characters and cut, because it often quotes file names, keys
    or file contents that we did not write.
    """

    def __init__(self, message: str) -> None:
        """Keep ``message`` as one printable line."""
        super().__init__(message_line(message))


def message_line(text: str) -> str:
    """A message as one line; of one that is longer than `LONGEST`, beginning and end, which says what to do."""
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _END - 5]} ... {line[-_END:]}"


def one_line(text: str) -> str:
    r"""Fold white space to single blanks and put ``?`` for control characters: ``"a\n\x1b[2J"`` -> ``"a ?[2J"``."""
    folded = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in folded)


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that looks most like ``name`` (case ignored), or None if none is as alike as ``cutoff`` (0..1)."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a list: ``unknown recipe `gpt3`, did you mean `gpt2`? valid: ...``.

    Args:
        kind: What is being named, for example ``"recipe"`` or ``"recipe key"``.
        name: What the user wrote.
        valid: All names that would have been accepted.

    Returns:
        The error, for the caller to raise.
    """
    names = sorted(valid)
    close = nearest(name, names)
    hint = f", did you mean `{close}`?" if close else "."
    listed = ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return UserError(f"unknown {kind} `{name}`{hint} valid: {listed or 'none'}")
