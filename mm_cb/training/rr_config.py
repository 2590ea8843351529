"""Settings of `RRTrainer`: those of a recipe, in one flat object."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError, model_validator

from mm_cb.core.errors import unknown
from mm_cb.training.recipes.config import CircuitBreaker, Machine, Recipe, Training, check_dial
from mm_cb.training.recipes.recipe import first_problem


class RRConfig(Machine, CircuitBreaker, Training):
    """What `RRTrainer` does: loss, schedule, batches, optimiser; every field as in a recipe, checked at construction.

    ``mm-cb train --fields`` lists them with range and default. ``dtype``, ``quantize`` and ``image_backend``
    are for a model that is given by name; one that is loaded already is taken as it is.

    Raises:
        TypeError: If there is no such field; names the nearest one.
        ValueError: If a value cannot stand where it is.

    Example:
        >>> RRConfig(output_dir="runs/rr", loss="rand_p", target_layers=[10, 20], max_steps=150).alpha
        5.0
    """

    output_dir: Path
    """Folder of ``metrics.jsonl`` and checkpoints, and of the adapter where `RRTrainer.save_model` is told no other."""
    device: str | None = None  # type: ignore[assignment]
    """Torch device; None = the first GPU where there is one."""

    @model_validator(mode="after")
    def _dial_holds(self) -> Self:
        check_dial(self.dial_from, self.recompute)
        return self

    if not TYPE_CHECKING:  # type checkers read the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                first = error.errors()[0]
                if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
                    name = str(first["loc"][0])
                    raise TypeError(str(unknown("field of RRConfig", name, type(self).model_fields))) from None
                raise ValueError(f"RRConfig: {first_problem(error)}") from None


def config_of(recipe: Recipe, output_dir: Path) -> RRConfig:
    """A recipe's settings as `RRTrainer` takes them."""
    sections = [recipe.circuit_breaker, recipe.training]
    fields = {name: getattr(section, name) for section in sections for name in type(section).model_fields}
    fields |= {name: getattr(recipe, name) for name in Machine.model_fields}
    return RRConfig(output_dir=output_dir, **fields)
