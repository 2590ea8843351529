"""What a recipe reads: its training data, and the files that decide the result by their content."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.data.examples import Example, Modality
from mm_cb.models.cache import model_folder

if TYPE_CHECKING:
    from mm_cb.data.sources import Rules, Source
    from mm_cb.training.batches import Batches
    from mm_cb.training.masks import MaskName
    from mm_cb.training.recipes.config import MixtureConfig, Recipe

SKIPPING = (
    "`mm-cb data check` finds all such rows; `data.skip_missing_images=true`, added to the command, "
    "leaves them out and counts them."
)
"""What to do about rows whose pictures are damaged or absent."""


def load_examples(recipe: "Recipe") -> Sequence[Example]:
    """The training data that a recipe names.

    Raises:
        UserError: If a file or a data set is missing or broken, or ids repeat across files.
    """
    if isinstance(recipe.data, str) and (guest := embedded(recipe.data)):
        return _judged(guest.training_examples(recipe.seed), recipe)
    assert not isinstance(recipe.data, str)
    from mm_cb.data import mixture

    return mixture.load_examples(sources_of(recipe.data), recipe.seed, rules_of(recipe))


_taken: tuple[Sequence[Example], tuple[object, ...]] | None = None
"""Examples that came with the package, and the settings under which a model of the package took every one last."""


def _judged(examples: Sequence[Example], recipe: "Recipe") -> Sequence[Example]:
    """Examples that are made in memory, if the model can take every one; a run is planned, then trained by them."""
    global _taken
    from mm_cb.data.scan import Scan, judged
    from mm_cb.data.sources import RowFault

    asked = _fit_settings(recipe)
    if _taken is not None and _taken[0] is examples and _taken[1] == asked:
        return examples
    rules = rules_of(recipe)
    for place, outcome in judged(examples, str(recipe.data), Scan(rules), rules):
        if isinstance(outcome, RowFault):
            raise UserError(f"{place}: {outcome.message}; `mm-cb data check` finds all such rows.")
    if embedded(recipe.model):  # another's files may be others the next time
        _taken = examples, asked
    return examples


def rules_of(recipe: "Recipe") -> "Rules":
    """Which rows of a recipe's data are left out, and which the model cannot take, as far as it is known here.

    Raises:
        UserError: If the model's configuration is broken.
    """
    from mm_cb.data.sources import Rules
    from mm_cb.training.planning.fit import fit_of

    missing, long = (getattr(recipe.data, f"skip_{what}", False) for what in ("missing_images", "too_long"))
    return Rules(missing, long, fit_of(*_fit_settings(recipe)))


def _fit_settings(recipe: "Recipe") -> tuple[str, int, "Mapping[Modality, MaskName]", "Batches", str]:
    """What decides whether a model can take a row, as `fit_of` takes it."""
    kinds = recipe.circuit_breaker.masks.by_modality
    return recipe.model, recipe.training.max_length, kinds, recipe.batches, recipe.image_backend


def absent_data(recipe: "Recipe") -> dict[str, str]:
    """Every file or data set that a recipe names → why it cannot be read here; empty if it can. No row is read.

    Raises:
        UserError: If one is named twice for the same set.
    """
    if isinstance(recipe.data, str):
        return {recipe.data: ""}
    sources, found = sources_of(recipe.data), dict[str, str]()
    from mm_cb.data.mixture import refuse_repeated
    from mm_cb.data.sources import open_source

    refuse_repeated(sources)
    for source in sources:
        try:
            open_source(source)
            found.setdefault(source.name, "")
        except UserError as error:
            found[source.name] = str(error)
    return found


def unfetched(recipe: "Recipe") -> list[str]:
    """Of all data that is published, or that shipped recipes name, and that is not here yet, how to get it.

    Raises:
        UserError: If anything else that the recipe names is missing, or cannot be read.
    """
    from mm_cb.core.recipe_files import data_names
    from mm_cb.data.cards import cards
    from mm_cb.data.sources import HUB_PREFIX

    known = cards().keys() | data_names()
    absent = {name: why for name, why in absent_data(recipe).items() if why}
    for name, why in absent.items():
        if (name not in known or Path(name).exists()) and not name.startswith(HUB_PREFIX):
            raise UserError(why)
    return list(absent.values())


def sources_of(data: "MixtureConfig | list[str]") -> "list[Source]":
    """A mixture's data sets, or files of our own rows, in the words of `mm_cb.data`."""
    from mm_cb.data.sources import Source

    if isinstance(data, list):
        return [Source(file, own=True) for file in data]
    fields = [source.model_dump() for source in data.sources]
    return [Source(**{**field, "images": field["images"] and Path(field["images"])}) for field in fields]


def input_files(recipe: "Recipe") -> list[Path | hub.Repository]:
    """What decides the result by its content, beside the data: an embedded model's files, a hub model's commit."""
    inputs: list[Path | hub.Repository] = []
    if guest := embedded(recipe.model):
        inputs += sorted(guest.weights.glob("*.safetensors"))
    model_folder(recipe.model)
    return inputs + hub.used(recipe.model)
