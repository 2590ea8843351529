"""Tools and calls in training rows: JSON schemas, and calls that a schema allows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mm_cb.core.calls import Call
from mm_cb.core.reading import shown, unfit
from mm_cb.core.records import JsonObject, Message

TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
"""JSON schema's types, as Python has them; True is no number."""
_SEVERAL = {"anyOf": any, "oneOf": any, "allOf": all}
"""Words with a list of schemas, and how many of them a value must fit."""
_OTHER_WORDS = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": "string",
    "int": "integer",
    "str": "string",
}


def read_tools(value: Any) -> list[JsonObject]:
    """Function definitions as chat templates take them: ``{"type": "function", "function": {...}}``.

    Args:
        value: A list of such, or of what stands in ``function``: name, description, parameters.

    Raises:
        ValueError: If one is no function with a JSON schema, or two have one name.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"`tools` must be a list of functions that is not empty, got {shown(value)}")
    found: list[JsonObject] = []
    for number, one in enumerate(value, start=1):
        inner: Any = one.get("function", one) if isinstance(one, dict) else one
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
            raise ValueError(
                f"tool {number} must be an object with a `name`, `description` and `parameters`, got {shown(one)}"
            )
        _check_schema(inner["name"], inner.get("parameters"))
        found.append({"type": "function", "function": inner})
    names = [str(one["function"]["name"]) for one in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`tools` must name every function once, `{repeated[0]}` comes again")
    if reason := unfit(json.dumps(found, ensure_ascii=False)):
        raise ValueError(f"a tool cannot be used: {reason}")
    return found


def read_calls(value: Any, tools: Sequence[JsonObject]) -> list[Call]:
    """The calls of an assistant's turn, each allowed by its function's schema.

    Args:
        value: A list of ``{"name": ..., "arguments": {...}}``, not empty.
        tools: The row's.

    Raises:
        ValueError: If one is no such object, calls an unknown function, or gives arguments that the schema forbids.
    """
    known = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    calls = []
    for one in value:
        if not isinstance(one, dict) or one.keys() != {"name", "arguments"} or not isinstance(one["arguments"], dict):
            raise ValueError(
                f'a call must be an object {{"name": text, "arguments": object}} and no more, got {shown(one)}'
            )
        if one["name"] not in known:
            names = ", ".join(sorted(known)) or "none: give `tools`"
            raise ValueError(f"a call must be of one of the row's tools ({names}), got {shown(one['name'])}")
        _check_arguments(one["name"], one["arguments"], known[one["name"]])
        calls.append(Call(one["name"], one["arguments"]))
    return calls


def as_json(value: Any) -> Any:
    """A value of a call as JSON has it: Python's tuples are lists, keys are texts."""
    if isinstance(value, dict):
        return {str(key): as_json(held) for key, held in value.items()}
    return [as_json(one) for one in value] if isinstance(value, list | tuple) else value


def as_stored(value: Any) -> Any:
    """As `as_json`, what no file of JSON can hold as a text: infinity, bytes, half a character."""
    if isinstance(value, dict):
        return {as_stored(str(key)): as_stored(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [as_stored(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    written = value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if written else repr(value)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 2 is 2.0, True is not 1, a tuple is a list."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def call_text(message: Message) -> str:
    """What a turn's calls say, to compare rows by."""
    calls = message.get("tool_calls") or []
    return json.dumps([list(call) for call in calls], ensure_ascii=False, sort_keys=True) if calls else ""


def _check_schema(name: str, schema: Any) -> None:
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or schema.get("type") != "object":
        raise ValueError(
            f"`parameters` of tool `{name[:80]}` must be a JSON schema of type `object` with `properties`, got "
            f"{shown(schema)}"
        )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) and key in properties for key in required):
        raise ValueError(f"`required` of tool `{name[:80]}` must name its properties, got {shown(required)}")
    _check_lists(f"tool `{name[:80]}`", schema)
    for key, one in properties.items():
        _check_types(f"`{key[:80]}` of tool `{name[:80]}`", one)


def _check_types(who: str, schema: Any) -> None:
    """Refuse what is no JSON schema, at every depth that properties and items reach."""
    if not isinstance(schema, dict):
        raise ValueError(f"{who} must be a JSON schema, an object, got {shown(schema)}")
    if "$ref" in schema:
        raise ValueError(
            f"{who} must say its schema itself, got the reference {shown(schema['$ref'])}: put it in place"
        )
    for word in _types(schema):
        if not isinstance(word, str) or word not in TYPES:
            meant = _OTHER_WORDS.get(word) if isinstance(word, str) else None
            hint = f"; JSON schemas say `{meant}`" if meant else ""
            raise ValueError(f"the type of {who} must be one of {', '.join(TYPES)}, got {shown(word)}{hint}")
    inner = schema.get("properties", {})
    if not isinstance(inner, dict):
        raise ValueError(f"`properties` of {who} must be an object, got {shown(inner)}")
    for key, one in inner.items():
        _check_types(f"`{key[:80]}` in {who}", one)
    if "items" in schema:
        _check_types(f"the items of {who}", schema["items"])
    _check_lists(who, schema)


def _check_lists(who: str, schema: JsonObject) -> None:
    """Refuse what a schema has in place of a list."""
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise ValueError(f"`required` of {who} must be a list of texts, got {shown(required)}")
    for word in ("enum", *_SEVERAL):
        if word in schema and (not isinstance(schema[word], list) or not schema[word]):
            raise ValueError(f"`{word}` of {who} must be a list that is not empty, got {shown(schema[word])}")
    for word in _SEVERAL:
        for one in schema.get(word, []):
            _check_types(f"`{word}` of {who}", one)


def _types(schema: JsonObject) -> list[Any]:
    """The types that a schema allows; none said = any."""
    declared = schema.get("type", [])
    return declared if isinstance(declared, list) else [declared]


def _check_arguments(name: str, arguments: JsonObject, schema: JsonObject) -> None:
    properties = schema.get("properties", {})
    if lacking := [key for key in schema.get("required", []) if key not in arguments]:
        raise ValueError(f"a call of `{name[:80]}` must give `{lacking[0][:80]}`, which its schema requires")
    for key, value in arguments.items():
        if key not in properties:
            known = ", ".join(properties) or "none"
            raise ValueError(f"a call of `{name[:80]}` must give its parameters ({known}), got `{key[:80]}`")
        _check_value(f"`{key[:80]}` of a call of `{name[:80]}`", value, properties[key])
    _check_several(f"a call of `{name[:80]}`", arguments, schema)
    try:
        reason = unfit(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError):
        reason = "JSON holds no such value"
    if reason:
        raise ValueError(f"an argument of a call of `{name[:80]}` cannot be used: {reason}")


def _check_value(who: str, value: Any, schema: JsonObject) -> None:
    words = _types(schema)
    if words and not any(_is_of(value, word) for word in words):
        raise ValueError(f"{who} must be of type {' or '.join(words)}, got {shown(value)}")
    if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
        raise ValueError(f"{who} must be one of {shown(schema['enum'])}, got {shown(value)}")
    _check_several(who, value, schema)
    if isinstance(value, list) and "items" in schema:
        for one in value:
            _check_value(f"an item of {who}", one, schema["items"])
    if isinstance(value, dict):
        if lacking := [key for key in schema.get("required", []) if key not in value]:
            raise ValueError(f"{who} must hold {shown(lacking[0])}, which its schema requires, got {shown(value)}")
        for key, one in schema.get("properties", {}).items():
            if key in value:
                _check_value(f"`{key[:80]}` in {who}", value[key], one)


def _check_several(who: str, value: Any, schema: JsonObject) -> None:
    for word, enough in _SEVERAL.items():
        if word in schema and not enough([_allowed(value, one) for one in schema[word]]):
            raise ValueError(f"{who} must fit {shown(schema[word])} (`{word}`), got {shown(value)}")


def _allowed(value: Any, schema: JsonObject) -> bool:
    try:
        _check_value("it", value, schema)
    except ValueError:
        return False
    return True


def _is_of(value: Any, word: str) -> bool:
    """Whether a value is of one of JSON schema's types: 2.0 is an integer, True is no number."""
    if isinstance(value, bool):
        return word == "boolean"
    if word == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[word])
