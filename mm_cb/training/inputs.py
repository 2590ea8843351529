"""What a recipe reads: its training data, and the files that decide the result by their content."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.data.examples import Example, read_examples
from mm_cb.models.cache import model_folder

if TYPE_CHECKING:
    from mm_cb.data.sources import Source
    from mm_cb.training.config import Mixture, Recipe

SKIPPING = (
    "`mm-cb data check` finds all such rows, and a mixture leaves them out and counts them: "
    "`data: {sources: [{name: FILE}], skip_missing_images: true}`."
)
"""What to do about rows whose pictures are damaged or absent."""


def load_examples(recipe: "Recipe") -> Sequence[Example]:
    """The training data that a recipe names.

    Raises:
        UserError: If a file or a data set is missing or broken, or ids repeat across files.
    """
    if isinstance(recipe.data, str) and (guest := embedded(recipe.data)):
        return guest.training_examples(recipe.seed)
    if isinstance(recipe.data, list):
        examples = [example for file in recipe.data for example in read_examples(Path(file))]
        if len({example.id for example in examples}) < len(examples):
            raise UserError(f"the ids of the training examples in {recipe.data} must all differ, some repeat.")
        for example in examples:
            for image in example.images:
                if isinstance(image, Path) and not image.is_file():
                    raise UserError(f"{example.place}: the picture `{image}` is not there; {SKIPPING}")
        return examples
    assert not isinstance(recipe.data, str)
    sources = sources_of(recipe.data)
    from mm_cb.data import mixture

    return mixture.load_examples(sources, recipe.seed, skip_missing_images=recipe.data.skip_missing_images)


def absent_data(recipe: "Recipe") -> dict[str, str]:
    """Every file or data set that a recipe names → why it cannot be read here; empty if it can. No row is read.

    Raises:
        UserError: If one is named twice for the same set.
    """
    if isinstance(recipe.data, str):
        return {recipe.data: ""}
    if isinstance(recipe.data, list):
        return {file: "" if Path(file).is_file() else f"`{file}` is not there." for file in recipe.data}
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


def sources_of(data: "Mixture") -> "list[Source]":
    """A mixture's data sets in the words of `mm_cb.data`."""
    from mm_cb.data.sources import Source

    fields = [source.model_dump() for source in data.sources]
    return [Source(**{**field, "images": field["images"] and Path(field["images"])}) for field in fields]


def input_files(recipe: "Recipe") -> list[Path | hub.Repository]:
    """What decides the result by its content, beside a mixture: files, and the model's commit if it is on the hub."""
    inputs: list[Path | hub.Repository] = []
    if isinstance(recipe.data, list):
        inputs += [Path(file) for file in recipe.data]
    if guest := embedded(recipe.model):
        inputs += sorted(guest.weights.glob("*.safetensors"))
    model_folder(recipe.model)
    return inputs + hub.used(recipe.model)
