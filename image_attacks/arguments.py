"""Numbers that callers give: Python's, numpy's or torch's, taken as Python's own."""

import operator
from typing import Any

import torch
from torch import Tensor


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


def refuse_other_types(name: str, ids: object) -> None:
    """Refuse what is no tensor of class or token ids; ValueError says what came in its place."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        came = f"{type(ids).__name__} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"`{name}` must be a tensor of whole numbers (int64), got a {came}.")


def refuse_outside(name: str, ids: Tensor, outside: Tensor, count: int, but: str = "") -> None:
    """Refuse ids beyond what the logits know; looks at values, which waits for a GPU."""
    if outside.any():
        wrong = ids[outside]
        raise ValueError(
            f"`{name}` must lie in 0 to {count - 1}, as the logits have {count} classes{but}; got {int(wrong[0])}, and "
            f"{len(wrong)} such in all."
        )
