"""The shipped recipes as files: their names, what each is for, what it needs. Imports nothing heavy, for lists."""

import os
from pathlib import Path
from typing import Any

from mm_cb.core.embedded import guests
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.reading import read_text

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


def recipe_summary(name_or_path: str | Path) -> str:
    """What a recipe is for: the comment in its first line."""
    first = recipe_text(name_or_path).partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def recipe_model(name: str) -> str:
    """The model that a shipped recipe names."""
    return str(_shipped(name)["model"])


def recipe_needs(name: str) -> str:
    """What one must have for a shipped recipe: its model, its data, its device."""
    fields = _shipped(name)
    if isinstance(fields["data"], str):
        return "nothing: model and data come with the package"
    data = [source["name"] for source in fields["data"]["sources"]]
    device = "a GPU" if str(fields.get("device", "cpu")).startswith("cuda") else "a CPU"
    return f"{device}, the model {fields['model']}, and the data {', '.join(data)}"


def _shipped(name: str) -> Any:
    """A shipped recipe's fields, quickly: files of ours need no strict reader, which takes ten times as long."""
    import yaml

    return yaml.load(recipe_text(name), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506  # a safe loader


def recipe_file(name_or_path: str | Path) -> Path:
    """The file of a shipped name, or the path itself.

    Raises:
        UserError: If there is no recipe of that name (names the nearest one), or the path is of another kind.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    files = recipe_files()
    if str(name_or_path) not in files and os.path.lexists(path):
        raise UserError(f"a recipe must be a shipped name or a file whose name ends in .yaml, got `{name_or_path}`.")
    if str(name_or_path) not in files:
        raise unknown("recipe", str(name_or_path), files)
    return files[str(name_or_path)]
