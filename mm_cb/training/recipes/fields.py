"""Every field of a recipe as a line to read: type, range, default and what it means."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mm_cb.training.recipes.config import Recipe
from mm_cb.training.registry import loss_entry, loss_names

Schema = Mapping[str, Any]
"""A JSON schema, or a part of one, as pydantic writes it."""


class FieldLine(NamedTuple):
    """One field that ``key=value`` can set, or that a mixture's source can hold."""

    name: str
    kind: str
    """What may stand there: ``"number > 0"``, ``"text | multimodal"``, ``"list of integer >= 1"``."""
    default: str
    """As YAML; ``"required"`` where there is none."""
    about: str


def recipe_fields() -> list[FieldLine]:
    """All fields in the order of a recipe, and behind ``loss_settings`` those of every loss."""
    schema = Recipe.model_json_schema()
    return list(_section(schema, schema["$defs"], ""))


def _section(schema: Schema, parts: Schema, prefix: str) -> Iterator[FieldLine]:
    for key, field in schema["properties"].items():
        name, inner = prefix + key, _part(field, parts)
        if inner is not None:
            yield from _section(inner, parts, f"{name}.")
            continue
        required = key in schema.get("required", ())
        default = "required" if required else _yaml(field.get("default"))
        yield FieldLine(name, _kind(field, parts), default, " ".join(field.get("description", "").split()))
        if name == "circuit_breaker.loss_settings":
            yield from _settings(name)
        for mixture in (one for one in _choices(field) if "$ref" in one):
            yield from _section(_part(mixture, parts) or {}, parts, f"{name}.")
        items = _part(field.get("items", {}), parts)
        if items is not None:
            yield from _section(items, parts, f"{name}.N.")


def _settings(name: str) -> Iterator[FieldLine]:
    for loss in loss_names():
        for key, setting in loss_entry(loss).settings.items():
            about = f"Loss {loss}: {setting.about}"
            yield FieldLine(f"{name}.{key}", f"number > {setting.above:g}", f"{setting.default:g}", about)


def _part(field: Schema, parts: Schema) -> Schema | None:
    """The section that a field is, if it is one."""
    return parts[field["$ref"].rpartition("/")[2]] if "$ref" in field else None


def _choices(field: Schema) -> list[Schema]:
    return [*field.get("anyOf", []), *field.get("oneOf", [])]


def _kind(field: Schema, parts: Schema) -> str:
    if choices := _choices(field):
        return " | ".join(_kind(choice, parts) for choice in choices)
    if "$ref" in field:
        return "sources"
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], parts)}"
    names = {"string": "text", "boolean": "true | false", "object": "key: number"}
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    kind = names[field["type"]] if field["type"] in names else field["type"]
    return " ".join([kind, *(f"{sign} {field[bound]}" for bound, sign in bounds if bound in field)])


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    named = {None: "null", True: "true", False: "false"}
    return named[value] if value is None or isinstance(value, bool) else "{}" if value == {} else str(value)
