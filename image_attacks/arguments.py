"""Numbers that callers give: Python's, numpy's or torch's, taken as Python's own."""

import operator
from typing import Any


def plain(value: Any) -> Any:
    """A number of any library as Python's own; what is none, or is true or false, as it is."""
    kind = str(getattr(value, "dtype", "number"))
    if isinstance(value, str | bytes | bool) or not any(name in kind for name in ("int", "float", "number")):
        return value
    for read in (operator.index, float):
        try:
            return read(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            continue
    return value


def number(name: str, value: object) -> float:
    """A number as Python's own; TypeError says what came in its place."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r:.60} ({type(value).__name__}).")
    return found


def whole(name: str, value: object, what: str = "a whole number") -> int:
    """A whole number as Python's own; ValueError says what came in its place."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"`{name}` must be {what}, got {value!r:.60} ({type(value).__name__}).")
    return found
