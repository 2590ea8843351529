"""What `mm-cb train` would refuse of a recipe's data, all of it, before a run."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.recipe_files import recipe_model, recipe_names
from mm_cb.data.check import Limits, Report, check_examples, check_sources
from mm_cb.data.examples import Example
from mm_cb.data.sources import Rules
from mm_cb.models.cache import model_folder
from mm_cb.training.batches import MissingRows, drawn
from mm_cb.training.inputs import rules_of, sources_of
from mm_cb.training.planning.fit import fit_of
from mm_cb.training.recipes.config import Masks
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.rr_config import config_of

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress
    from mm_cb.training.recipes.config import Recipe
    from mm_cb.training.rr_config import RRConfig

_TOGETHER = 64
"""Rows whose pictures are in memory at once."""


def check_recipe(recipe: "Recipe", limits: Limits, progress: "Progress | None" = None) -> Report:
    """Read a recipe's data as training does, but to the end, and draw the rows of its batches.

    Raises:
        UserError: If a data source cannot be opened at all.
    """
    rules = rules_of(recipe)
    if isinstance(recipe.data, str):
        guest = embedded(recipe.data)
        assert guest is not None, recipe.data
        examples = guest.training_examples(recipe.seed)
        report = check_examples(examples, limits, recipe.data, rules)
    else:
        report = check_sources(sources_of(recipe.data), limits, seed=recipe.seed, rules=rules, progress=progress)
        examples = report.mixture or []
    if rules.fit is None:
        missing = f"the processor of `{recipe.model}` is not on this machine: whether rows fit the model is not checked"
        report.add("not checked", partial(str, missing))
    if not report.has_errors:
        try:
            check_draw(examples, recipe)
        except UserError as error:
            report.add("missing rows", partial(str, error))
    return report


def check_draw(examples: Sequence[Example], recipe: "Recipe") -> None:
    """Draw the rows of a run's batches, and those that are held out.

    Raises:
        UserError: If there are too few.
    """
    try:
        drawn(examples, config_of(recipe, Path()))
    except MissingRows as error:
        raise UserError(f"recipe `{recipe.name}`: {error}") from error


def open_drawn(examples: Sequence[Example], settings: "RRConfig") -> None:
    """Open the pictures of all rows that a run will draw, so that it does not stop in its middle.

    Those that it will not draw are left to `mm-cb data check`: a mixture may hold a hundred times as many.

    Raises:
        MissingRows: As `drawn`.
        PictureError: Naming the first that cannot be read, with file and line.
    """
    rows, held_out = drawn(examples, settings)
    waiting = itertools.chain(rows.drawn(), *held_out)
    with ThreadPoolExecutor() as pool:
        while some := list(itertools.islice(waiting, _TOGETHER)):
            for _ in pool.map(Example.open_images, some):
                pass


def rules_for(model: str, max_length: int) -> Rules:
    """The rules for data files that no recipe names: those of the model's shipped recipe, or else the paper's masks.

    Raises:
        UserError: If the model's files are not here or cannot be used.
    """
    model_folder(model)  # says what `fit_of` passes over
    shipped = next((name for name in recipe_names() if recipe_model(name) == model), None)
    masks = Masks() if shipped is None else load_recipe(shipped).circuit_breaker.masks
    return Rules(fit=fit_of(model, max_length, masks.by_modality, "alternate", "pil"))
