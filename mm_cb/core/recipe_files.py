"""The shipped recipes as files: their names, kinds, models and data. Imports nothing heavy, for lists."""

import os
import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from mm_cb.core.embedded import guests
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.folders import but_is
from mm_cb.core.reading import load_yaml, read_text
from mm_cb.core.records import JsonObject

RECIPES = Path(__file__).resolve().parents[1] / "training" / "recipes"


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name, those of embedded models among them."""
    folders = [RECIPES, *(guest.recipes for guest in guests())]
    return {file.stem: file for file in sorted((f for d in folders for f in d.glob("*.yaml")), key=lambda f: f.stem)}


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return list(recipe_files())


def recipe_text(name_or_path: str | Path) -> str:
    """A recipe's file as it is written, with its comments.

    Raises:
        UserError: If there is none.
    """
    return read_text(recipe_file(name_or_path), "recipe")


def read_recipe(name_or_path: str | Path) -> JsonObject:
    """The fields of a recipe, unchecked.

    Raises:
        UserError: If there is none, or its file is not YAML with `key: value` lines.
    """
    path = recipe_file(name_or_path)
    fields = load_yaml(read_text(path, "recipe"), str(path))
    if not isinstance(fields, dict):
        came = "it is empty" if fields is None else f"got {type(fields).__name__}"
        raise UserError(f"the recipe `{path}` must hold `key: value` lines, {came}.")
    return fields


def recipe_purpose(name: str) -> str:
    """What a shipped recipe is for: the first sentence of its file, without the full stop."""
    comment = " ".join(line[1:].strip() for line in takewhile(lambda s: s[:1] == "#", recipe_text(name).splitlines()))
    return re.split(r"\.(?= |$)", comment)[0]


def recipe_model(name: str) -> str:
    """The model that a shipped recipe names."""
    return str(_shipped(name)["model"])


class RecipeGroup(NamedTuple):
    """Recipes of one kind."""

    kind: str
    about: str
    """What they are."""
    names: list[str]
    data: list[str]
    """What all of them are trained on; for those of the package nothing that one must have."""
    further: dict[str, list[str]]
    """What some are trained on besides, by recipe."""


def recipe_groups() -> list[RecipeGroup]:
    """The shipped recipes by kind: what comes with the package, pictures and texts, texts alone, agents."""
    data = {name: _data(fields) for name in recipe_names() for fields in [_shipped(name)]}
    groups = []
    for kind in _KINDS:
        names = [name for name in data if _kind(name, data[name]) == kind]
        common = [one for one in data[names[0]] if all(one in data[name] for name in names)]
        further = {name: [one for one in data[name] if one not in common] for name in names}
        groups.append(
            RecipeGroup(kind, _KINDS[kind], names, common, {name: more for name, more in further.items() if more})
        )
    return groups


def data_names() -> set[str]:
    """All data that shipped recipes name: published data sets, and files that one builds."""
    return {name for recipe in recipe_names() for name in _data(_shipped(recipe))}


_KINDS = {
    "packaged": "the whole method at the size of a CPU",
    "vision-language": "the paper's method on pictures and texts, a recipe a model",
    "text": "the paper's text experiment",
    "agents": "models that call tools, with calls mixed in",
}
"""Kind → what its recipes are."""
_CALLS = "calls.jsonl"
"""How the files of calls are named, which agents are trained on."""


def _kind(name: str, data: list[str]) -> str:
    if not data:
        return "packaged"
    if any(one.endswith(_CALLS) for one in data):
        return "agents"
    return "text" if _shipped(name)["batches"] == "text" else "vision-language"


def _data(fields: Any) -> list[str]:
    """Names of the data sets that a shipped recipe mixes; none where they come with the package."""
    return [] if isinstance(fields["data"], str) else [source["name"] for source in fields["data"]["sources"]]


def recipe_device(name: str) -> str:
    """What a shipped recipe computes on: "a GPU" or "a CPU"."""
    return "a GPU" if str(_shipped(name).get("device", "cpu")).startswith("cuda") else "a CPU"


@cache
def _shipped(name: str) -> Any:
    """A shipped recipe's fields, quickly: files of ours need no strict reader, which takes ten times as long."""
    import yaml

    return yaml.load(recipe_text(name), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506  # a safe loader


def is_recipe_path(path: str | Path) -> bool:
    """Whether a name is that of a recipe's file, and none of a shipped one."""
    return Path(path).suffix.lower() in (".yaml", ".yml")


def recipe_file(name_or_path: str | Path) -> Path:
    """The file of a shipped name, or the path itself.

    Raises:
        UserError: If there is no recipe of that name (names the nearest one), or the path is of another kind.
    """
    path = Path(name_or_path)
    if is_recipe_path(path):
        return path
    files = recipe_files()
    if str(name_or_path) not in files and os.path.lexists(path):
        raise UserError(
            f"a recipe must be a shipped name or a file whose name ends in .yaml, got `{name_or_path}`{but_is(path)}."
        )
    if str(name_or_path) not in files:
        raise unknown("recipe", str(name_or_path), files)
    return files[str(name_or_path)]
