"""docs/supported_models.md: its table is the registry's; `python -m tests.models.test_supported` writes it anew."""

import re
from pathlib import Path

from mm_cb.core.recipe_files import recipe_names
from mm_cb.models import VisionModel
from mm_cb.models.registry import _FAMILIES
from mm_cb.training.recipes.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
HEAD = "| `model_type` | class | train | attack, universal | 4-bit: what stays full | recipes |\n" + "|---" * 6 + "|\n"


def table() -> str:
    """A row for each model type of a family that sees."""
    recipes: dict[str, list[str]] = {}
    from mm_cb.models.known import known_config

    for name in recipe_names():
        if (config := known_config(load_recipe(name).model)) is not None:
            recipes.setdefault(config.model_type, []).append(f"`{name}`")
    rows = []
    for kind, family in sorted(_FAMILIES.items()):
        attacked = "yes" if family.plan is not VisionModel.plan else "no"
        kept = ", ".join(f"`{one}`" for one in family.full_precision)
        rows.append(
            f"| `{kind}` | `{family.__name__}` | yes | {attacked} | {kept} | {', '.join(recipes.get(kind, []))} |"
        )
    return HEAD + "\n".join(rows) + "\n"


def test_the_page_is_the_registrys():
    written = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"\| `model_type`.*?\n\n", written, re.S)
    assert found == table() + "\n", "python -m tests.models.test_supported"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\| `model_type`.*?\n\n", lambda _: table() + "\n", page, flags=re.S), encoding="utf-8")
