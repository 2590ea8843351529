"""docs/supported_models.md: its table is the registry's; `python -m tests.models.test_supported` writes it anew."""

import re
from pathlib import Path

from mm_cb.core.recipe_files import recipe_names
from mm_cb.models.known import known_config
from mm_cb.models.registry import _FAMILIES
from mm_cb.training.recipes.recipe import load_recipe
from tests.models import laws
from tests.models.test_family_laws import TOWERS
from tests.models.tiny import KINDS, tiny, tiny_with

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
COLUMNS = (
    *("`model_type`", "class", "language towers", "train", "attack", "universal", "endpoint", "laws"),
    *("4-bit: what stays full", "recipes"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|\n"
SERVED = "answers"
"""A server says what it likes of a model's type, and nobody asks: text comes back, no gradient."""


def type_of(config) -> str:
    """The entry of the registry's table that a configuration is read by."""
    own = f"{config.model_type}+{config.vision_config.model_type}"
    return own if own in _FAMILIES else config.model_type


def under_the_laws():
    return [*map(tiny, KINDS), *(tiny_with(*one) for one in TOWERS)]


def table() -> str:
    """A row for each model type of a family that sees; what was checked is what the tests run over it."""
    recipes: dict[str, list[str]] = {}
    for name in recipe_names():
        if (config := known_config(load_recipe(name).model)) is not None and hasattr(config, "vision_config"):
            recipes.setdefault(type_of(config), []).append(f"`{name}`")
    towers = {(type_of(model.base.config), model.tower.config.model_type) for model in under_the_laws()}
    tested = {kind for kind, _ in towers}
    rows = []
    for kind, family in sorted(_FAMILIES.items()):
        run = laws.LAWS if kind in tested else []
        trained, attacked, universal = (
            "yes" if law in run else "not checked"
            for law in (
                laws.training_reroutes,
                laws.an_attack_lowers_the_loss_that_the_file_has,
                laws.lean_passes_are_the_whole_model,
            )
        )
        checked = f"{len(laws.LAWS)}, and {len(laws.BY_PIXELS)} with torchvision" if run else "none"
        kept = ", ".join(f"`{one}`" for one in family.full_precision)
        cells = [
            f"`{kind}`",
            f"`{family.__name__}`",
            ", ".join(f"`{tower}`" for of, tower in sorted(towers) if of == kind),
            trained,
            attacked,
            universal,
            SERVED,
            checked,
            kept,
            ", ".join(recipes.get(kind, [])),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n"


def test_every_family_is_under_the_laws():
    assert {type_of(tiny(kind).base.config) for kind in KINDS} == set(_FAMILIES)


def test_every_language_tower_that_a_family_names_is_under_the_laws():
    run = {(type(model), model.tower.config.model_type) for model in under_the_laws()}
    assert run == {(family, tower) for family in _FAMILIES.values() for tower in family.text_types}


def test_the_page_is_the_registrys():
    written = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"\| `model_type`.*?\n\n", written, re.S)
    assert found == table() + "\n", "python -m tests.models.test_supported"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\| `model_type`.*?\n\n", lambda _: table() + "\n", page, flags=re.S), encoding="utf-8")
