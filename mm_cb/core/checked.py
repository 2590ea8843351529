"""Readers of JSON files that hold records: a wrong or missing value is an error that names file, line and key."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from mm_cb.core.errors import UserError
from mm_cb.core.files import jsonl_lines
from mm_cb.core.reading import TextFault, decode, is_there, loads

T = TypeVar("T")
_LARGEST = 2**63


def read_records(path: Path, kind: type[T]) -> list[T]:
    """The records of a file of JSON lines; none where there is no file, and a torn last line is dropped.

    Raises:
        UserError: If a line is no such record; names the file and the line.
    """
    return [checked(record, kind, f"{path}:{number}") for number, record in jsonl_lines(path)]


def read_record(path: Path, kind: type[T]) -> T:
    """The record that a JSON file holds.

    Raises:
        UserError: If there is no such file, or it holds something else; names the file.
    """
    if not is_there(path):
        raise UserError(f"`{path}` must be a file with a JSON object, there is none.")
    return checked(read_json(path), kind, f"`{path}`")


def read_list(path: Path, kind: type[T]) -> list[T]:
    """The records of a JSON file that holds a list of them; none where there is no file.

    Raises:
        UserError: If it holds something else; names the file and the entry.
    """
    content = read_json(path)
    if content is None:
        return []
    if not isinstance(content, list):
        raise UserError(f"`{path}` must hold a JSON list, got {type(content).__name__}.")
    return [checked(entry, kind, f"`{path}`, entry {place}") for place, entry in enumerate(content, start=1)]


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where nothing is there.

    Raises:
        UserError: If it cannot be read, or is no file.
    """
    try:
        return loads(decode(path.read_bytes()), any_text=True) if is_there(path) else None
    except (OSError, TextFault) as e:
        place = f" in line {e.line}" if isinstance(e, TextFault) else ""
        raise UserError(f"`{path}` must be readable JSON, got{place}: {e}; repeat the step that writes it.") from e


def checked(content: object, kind: type[T], where: str) -> T:
    """A JSON value, seen to be a record of this kind; further keys are left as they are.

    Args:
        content: What was read.
        kind: A TypedDict.
        where: File and line.

    Raises:
        UserError: If a required key is missing or a value is of another type.
    """
    if fault := _fault(content, kind):
        name = fault.path.removeprefix(".")
        raise UserError(f"{where}{f': `{name}`' if name else ''} must {fault.text}.")
    return cast("T", content)


def made(content: object, kind: type[T], where: str) -> T:
    """A dataclass of plain values from the JSON object of its fields; lists become tuples, further keys are left out.

    Raises:
        UserError: As `checked`.
    """
    held = cast("Mapping[str, Any]", checked(content, kind, where))
    known = {key: held[key] for key in _fields(cast("Any", kind))[0] if key in held}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})


class _FieldFault(NamedTuple):
    """What is wrong, and where in the record."""

    path: str
    text: str


def _fault(value: object, kind: Any) -> _FieldFault | None:
    allowed = _allowed(kind)
    if type(value) not in allowed:
        text = json.dumps(value, ensure_ascii=False)
        named = (one for one in _WORDS if one in allowed and not (one is int and float in allowed))
        expected = " or ".join(_WORDS[one] for one in named)
        return _FieldFault("", f"be {expected}, got {text if len(text) <= 60 else text[:57] + '...'}")
    if type(value) is int and abs(value) >= _LARGEST:
        return _FieldFault("", "be a number of at most 64 bits, got a larger one")
    inside = allowed[type(value)]
    if inside is None:
        return None
    if _is_record(inside):
        return _fault_in_record(cast("dict[str, Any]", value), inside)
    types_inside = typing.get_args(inside)
    if isinstance(value, dict):
        parts = ((f".{key}", one, types_inside[1]) for key, one in value.items())
    else:
        held = cast("list[Any]", value)
        if typing.get_origin(inside) is tuple and types_inside[-1] is not ... and len(held) != len(types_inside):
            return _FieldFault("", f"be a list of {len(types_inside)}, got {len(held)}")
        parts = ((f"[{place}]", one, types_inside[0]) for place, one in enumerate(held))
    return next(
        (_FieldFault(at + fault.path, fault.text) for at, one, kind in parts if (fault := _fault(one, kind))), None
    )


def _fault_in_record(value: Mapping[str, Any], kind: Any) -> _FieldFault | None:
    fields, required = _fields(kind)
    if lacking := [key for key in required if key not in value]:
        return _FieldFault("", f"hold {', '.join(required)}; it lacks {', '.join(lacking)}")
    for key, one in value.items():
        if key in fields and (fault := _fault(one, fields[key])):
            return _FieldFault(f".{key}{fault.path}", fault.text)
    return None


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""The types that JSON's reader makes, and what an error line calls them."""


@functools.cache
def _allowed(kind: Any) -> dict[type, Any]:
    """JSON's types that a value may have → what it holds inside, None where nobody looks into it."""
    if kind is Any:
        return dict.fromkeys(_WORDS)
    if isinstance(kind, types.UnionType):
        return {one: inside for part in typing.get_args(kind) for one, inside in _allowed(part).items()}
    if _is_record(kind):
        return {dict: kind}
    origin = typing.get_origin(kind) or kind
    if origin is float:
        return {float: None, int: None}
    return {{tuple: list, Mapping: dict}.get(origin, origin): kind if typing.get_args(kind) else None}


@functools.cache
def _is_record(kind: Any) -> bool:
    return typing.is_typeddict(kind) or dataclasses.is_dataclass(kind)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a record with their types, and those that must be there, in order."""
    fields = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):
        marks = {key: typing.get_origin(hint) for key, hint in typing.get_type_hints(kind, include_extras=True).items()}
        return fields, tuple(  # by the marks too: the class's own list lacks them where annotations are put off
            key
            for key in fields
            if marks[key] is typing.Required or (key in kind.__required_keys__ and marks[key] is not typing.NotRequired)
        )
    needed = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING)
    return fields, tuple(needed)
