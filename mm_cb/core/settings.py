"""``key=value`` on the command line, read into the dataclass that holds an evaluation's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from mm_cb.core.errors import UserError, unknown

Settings = TypeVar("Settings")
_DIGITS = 9


def with_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings with ``key=value`` texts applied; a value is read as what its default is.

    Texts stay as they are, numbers must be whole, at least 0 and of at most nine digits, tuples are comma-separated.

    Raises:
        UserError: As `pairs` does, or if a value is not of the default's kind.
    """
    valid = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    changes = {key: read_value(key, value, valid[key]) for key, value in pairs(overrides, valid).items()}
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def pairs(overrides: Sequence[str], valid: Iterable[str]) -> dict[str, str]:
    """``key=value`` texts as keys and values.

    Raises:
        UserError: If a text is no ``key=value``, a key is unknown (the nearest valid one is named) or comes twice.
    """
    keys = sorted(valid)
    found: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"settings must read key=value, got `{text}`; valid keys: {', '.join(keys)}.")
        if key not in keys:
            raise unknown("setting", key, keys)
        if key in found:
            raise UserError(f"`{key}` must be set once, it comes again as `{value}`; leave one of them out.")
        found[key] = value
    return found


def read_value(key: str, value: str, default: Any) -> Any:
    """A text as what the default is.

    Raises:
        UserError: If it is not of that kind.
    """
    if isinstance(default, tuple):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(default, int):
        if not value.isdecimal() or len(value) > _DIGITS:
            raise UserError(f"`{key}` must be a whole number from 0 to 999999999, got `{value[:40]}`.")
        return int(value)
    if isinstance(default, float):
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise UserError(f"`{key}` must be a number of at least 0, got `{value}`.")
        return number
    return value
