"""Readers of JSON files that hold records: a wrong or missing value is an error that names file, line and key."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import jsonl_lines

T = TypeVar("T")


def read_records(path: Path, kind: type[T]) -> list[T]:
    """The records of a file of JSON lines; none where there is no file, and a torn last line is dropped.

    Raises:
        UserError: If a line is no such record; names the file and the line.
    """
    return [checked(record, kind, f"{path}:{number}") for number, record in jsonl_lines(path)]


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
    """The content of a JSON file; None where there is no file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as e:
        message = f"`{path}` must be readable JSON, got: {one_line(str(e))}; repeat the step that writes it."
        raise UserError(message) from e


def checked(content: object, kind: type[T], where: str) -> T:
    """A JSON value, seen to be a record of this kind; further keys are left as they are.

    Args:
        content: What was read.
        kind: A TypedDict.
        where: File and line.

    Raises:
        UserError: If a required key is missing or a value is of another type.
    """
    if fault := _fault(content, kind, ""):
        raise UserError(f"{where}{fault}")
    return cast("T", content)


def made(content: object, kind: type[T], where: str) -> T:
    """A dataclass of plain values from the JSON object of its fields; lists become tuples, further keys are left out.

    Raises:
        UserError: As `checked`.
    """
    held = cast("Mapping[str, Any]", checked(content, kind, where))
    known = {key: held[key] for key in typing.get_type_hints(kind) if key in held}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})


def _fault(value: object, kind: Any, name: str) -> str:
    """What is wrong with a value, as the end of an error line, or the empty string."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    fitting = [one for one in kinds if _is_a(value, one)]
    if not fitting:
        text = json.dumps(value, ensure_ascii=False)
        expected = " or ".join(_WORDS.get(_base(one), "left out") for one in kinds)
        return f"{_called(name)} must be {expected}, got {text if len(text) <= 60 else text[:57] + '...'}."
    return _fault_inside(value, fitting[0], name)


def _fault_inside(value: object, kind: Any, name: str) -> str:
    parts: list[tuple[str, object, Any]] = []
    inner = typing.get_args(kind)
    if _is_record(kind) and isinstance(value, dict):
        fields, required = _fields(kind)
        if lacking := [key for key in required if key not in value]:
            return f"{_called(name)} must hold {', '.join(required)}; it lacks {', '.join(lacking)}."
        dot = f"{name}." if name else ""
        parts = [(dot + key, value[key], wanted) for key, wanted in fields.items() if key in value]
    elif isinstance(value, dict) and inner:
        parts = [(f"{name}.{key}", one, inner[1]) for key, one in value.items()]
    elif isinstance(value, list) and inner:
        if typing.get_origin(kind) is tuple and inner[-1] is not ... and len(value) != len(inner):
            return f"{_called(name)} must be a list of {len(inner)}, got {len(value)}."
        parts = [(f"{name}[{place}]", one, inner[0]) for place, one in enumerate(value)]
    return next((fault for key, one, wanted in parts if (fault := _fault(one, wanted, key))), "")


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


def _is_a(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    base = _base(kind)
    if isinstance(value, bool):
        return base is bool
    return isinstance(value, int | float) if base is float else isinstance(value, base)


def _base(kind: Any) -> Any:
    """The Python type that JSON's reader makes of it: lists of tuples too, dicts of all records."""
    origin = typing.get_origin(kind) or kind
    return {tuple: list, Mapping: dict}.get(origin, dict if _is_record(kind) else origin)


def _is_record(kind: Any) -> bool:
    return typing.is_typeddict(kind) or dataclasses.is_dataclass(kind)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a record with their types, and those that must be there, in order."""
    fields = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):
        return fields, tuple(key for key in fields if key in kind.__required_keys__)
    needed = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING)
    return fields, tuple(needed)


def _called(name: str) -> str:
    return f": `{name}`" if name else ""
