"""Recipes: everything that decides a training run, read from YAML, checked, overridden by dotted ``key=value``."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mm_cb.core.errors import UserError, called, unknown
from mm_cb.core.reading import load_yaml, shown
from mm_cb.core.recipe_files import read_recipe
from mm_cb.core.records import JsonObject
from mm_cb.training.recipes.config import DataSource, MixtureConfig, Recipe

_NEAR = 3
"""Names that an error line about an unknown key gives."""
_FREE = ("data.", "circuit_breaker.loss_settings.")
"""Below these, the fields' own checks say which keys there are."""

_EXPECTED = {
    "model_": "`key: value` fields are",
    "dict_": "`key: value` fields are",
    "list_": "a list is",
    "string_type": "a text is",
    "string_too_short": "a text is",
    "path_type": "a path is",
    "too_short": "one at least is",
    "bool_": "true or false is",
    "int_": "a whole number is",
    "float_": "a number is",
    "finite_": "a finite number is",
}
"""How the names of pydantic's errors begin, and what they mean."""


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: A shipped name or a YAML file.
        overrides: ``"training.max_steps=60"``, dotted names and YAML values; of one name the last counts. A group's
            ``"training={max_steps: 60}"`` is the same: its other fields stay as they are.

    Returns:
        The checked recipe.

    Raises:
        UserError: If the recipe is not there, is not YAML, or holds an unknown key (names the nearest valid one) or a
            wrong value.
    """
    fields = read_recipe(name_or_path)
    for override in overrides:
        _set(fields, *_parts(override))
    _refuse_unknown(fields)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"recipe `{name_or_path}`: {first_problem(error)}") from error


def typed_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, of a command line: nobody means two values of one field.

    Raises:
        UserError: As there; or if a field is given twice, alone or with its group.
    """
    given: dict[str, str] = {}
    for override in overrides:
        _refuse_repeated(*_parts(override), override, given)
    return load_recipe(name_or_path, overrides)


def deciding(recipe: Recipe) -> JsonObject:
    """Its fields without those that change no bit of the result: a run goes on whatever they are."""
    return recipe.model_dump(mode="json", exclude={"training": {"dataloader_num_workers", "picture_cache"}})


def first_problem(error: ValidationError) -> str:
    """One line for what stands wrong in the fields of a recipe: which one, what is expected there, what came."""
    first = error.errors()[0]
    parts = list(map(str, first["loc"]))
    if parts[:1] == ["data"] and len(parts) > 1:
        del parts[1]  # which kind of data, in our own words
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        valid = (MixtureConfig if len(parts) == 2 else DataSource).model_fields if parts[0] == "data" else recipe_keys()
        return str(unknown(f"key of `{'.'.join(parts[:-1])}`", parts[-1], valid))
    named = next((words for kind, words in _EXPECTED.items() if first["type"].startswith(kind)), None)
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    expected = f"{named} expected" if named else said
    if first["type"] == "literal_error":
        expected = f"{first['ctx']['expected']} is expected".replace("'", "`")
    got = f"got {first['input']!r:.80}"
    if not isinstance(first["input"], Mapping) and not expected.endswith(got):  # a whole section says less
        expected = f"{expected}, {got}"
    return f"{f'`{key}`: ' if key else ''}{expected}."


def _parts(override: str) -> tuple[str, Any]:
    """Key and value of a ``key=value``."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"expected key=value, for example training.max_steps=60, got `{override}`.")
    return key.strip(), load_yaml(value, f"the value in `{override}`")


def _refuse_repeated(key: str, value: Any, override: str, given: dict[str, str]) -> None:
    """Refuse what gives a field that was given before, alone or with its group: the last would count.

    Args:
        key: Dotted name.
        value: Its value.
        override: Both, as typed.
        given: Every field that was given so far, with what gave it; this one's are added.
    """
    for field in _dotted({key: value}):
        if (before := given.get(field)) is not None:
            raise UserError(f"`{field}` is given more than once, by `{before}` and `{override}`: leave one of them.")
    before = next((one for field, one in given.items() if field.startswith(f"{key}.")), None)
    if before and not (value and isinstance(value, Mapping)):
        raise UserError(f"`{override}` sets all of `{key}`: give it in front of `{before}`.")
    files = ["data.sources"] if key == "data" and isinstance(value, list) else []
    given.update(dict.fromkeys([key, *files, *_dotted({key: value})], override))


def _set(fields: Any, key: str, value: Any) -> None:
    """Set a dotted key in nested fields; of a group, the fields that its value names; a list's parts have numbers."""
    *sections, last = key.split(".")
    top: Any = fields
    for section in sections:
        inner = fields.setdefault(section, {}) if isinstance(fields, dict) else fields[_place(fields, section, key)]
        if section == "data" and isinstance(inner, list):  # files, which are sources of a mixture
            inner = fields[section] = {"sources": [{"name": file} for file in inner]}
        if not isinstance(inner, dict) and not _sections(inner):
            raise _unknown_key(key, f"`{section}` is {shown(inner)}, which has no fields")
        fields = inner
    if value == {} and any(name.startswith(f"{key}.") for name in recipe_keys()):
        raise UserError(f"`{key}={{}}` names no field to change: leave it out, or name one (`mm-cb train --fields`).")
    place = _place(fields, last, key)
    held = fields.get(place) if isinstance(fields, dict) else fields[place]
    if isinstance(value, dict) and value and isinstance(held, dict | list):
        for name, one in value.items():
            _set(top, f"{key}.{name}", one)
    else:
        fields[place] = value


def _sections(value: Any) -> bool:
    """Whether something is a list of groups of fields, as a mixture's sources are."""
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _place(fields: Any, name: str, key: str) -> Any:
    """Where a part of a dotted key stands: under its name, in a list under its number."""
    if isinstance(fields, dict):
        return name
    if not name.isdecimal() or int(name) >= len(fields):
        raise _unknown_key(key, f"in place of `{name:.20}` a number from 0 to {len(fields) - 1} is expected")
    return int(name)


def _unknown_key(key: str, why: str = "") -> UserError:
    """The error for a key that there is not, with the nearest ones, or why it cannot stand there."""
    valid = recipe_keys()
    last = key.rpartition(".")[2]
    near = called(key, valid) or difflib.get_close_matches(key.lower(), valid, _NEAR)
    near += [name for name in valid if name.rpartition(".")[2] == last and name not in near]
    meant = f"; did you mean {' or '.join(f'`{name}`' for name in near[:_NEAR])}?" if near and not why else ""
    said = f": {why}" if why else meant
    return UserError(f"unknown recipe key `{key:.80}`{said}; `mm-cb train --fields` lists all.".replace("?;", "?"))


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """All dotted keys a recipe can hold, without those of sections themselves."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += recipe_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _refuse_unknown(fields: Mapping[Any, Any]) -> None:
    valid = recipe_keys()
    sections = {key.rsplit(".", depth)[0] for key in valid for depth in range(1, key.count(".") + 1)}
    for key in _dotted(fields):
        if key not in valid and key not in sections and not key.startswith(_FREE):
            raise _unknown_key(key)


def _dotted(fields: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
