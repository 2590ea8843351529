"""What a recipe would do, from the model's shape alone: which modules train, what is loaded, what memory it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mm_cb.core.devices import refuse_absent
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.sizes import GIB, told_size
from mm_cb.models import ChatModel
from mm_cb.models.cache import model_folder
from mm_cb.models.families import load_processor, read_config, skeleton
from mm_cb.models.known import known_config
from mm_cb.models.loading import refuse_attention
from mm_cb.training.loading import refuse_cache
from mm_cb.training.placement import KeptBlocks, adapter_size, check_targets, lora_paths
from mm_cb.training.planning.memory import Memory, estimate

if TYPE_CHECKING:
    from mm_cb.training.recipes.config import Recipe


class Smaller(NamedTuple):
    """Settings that need less memory."""

    tokens_per_pass: int
    recompute: bool = False
    quantize: str | None = None

    def overrides(self) -> list[str]:
        """As they are written behind ``mm-cb train RECIPE``."""
        return [
            *([f"quantize={self.quantize}"] if self.quantize else []),
            *(["training.recompute=true"] if self.recompute else []),
            f"training.tokens_per_pass={self.tokens_per_pass}",
        ]


SMALLER = [
    Smaller(tokens, recompute, quantize)
    for quantize in (None, "4bit")
    for recompute in (False, True)
    for tokens in (4096, 2048, 1024)
]
"""What to try on a smaller device, in this order; only 4-bit weights change the numbers."""


@dataclass(frozen=True)
class TrainingPlan:
    """A checked recipe with its placement.

    Attributes:
        recipe: The recipe.
        model: The whole model as shapes.
        paths: The modules that get LoRA, full paths, in the model's order.
        kept: What is loaded of the language tower.
        parameters: Size of the adapter.
        longest_row: Tokens of the longest row that can come, see `longest_row`.
        published: Whether the shape is the published one, because the model's configuration is not on this machine.
    """

    recipe: "Recipe"
    model: ChatModel
    paths: list[str]
    kept: KeptBlocks
    parameters: int
    published: bool
    longest_row: int

    @property
    def settings(self) -> Smaller:
        """What the recipe says of memory."""
        options = self.recipe.training
        return Smaller(options.tokens_per_pass, options.recompute, self.recipe.quantize)

    def memory(self, settings: Smaller | None = None) -> Memory:
        """Peak of a training step, as the recipe has it or with other settings; a row is never split."""
        chosen = settings or self.settings
        return estimate(
            self.model,
            self.paths,
            self.kept,
            r=self.recipe.lora.r,
            dtype=self.recipe.dtype,
            tokens=max(chosen.tokens_per_pass, self.longest_row),
            quantize=chosen.quantize,
            recompute=chosen.recompute,
            adversary=bool(self.recipe.circuit_breaker.adversary.steps),
        )

    def fitting(self, free: float) -> list[str]:
        """Overrides for the first of `SMALLER` with which the run fits into ``free`` bytes; empty if none does."""
        return next((settings.overrides() for settings in SMALLER if self.memory(settings).total <= free), [])


def make_plan(recipe: "Recipe") -> TrainingPlan:
    """Check a recipe against its model's shape; loads no weight.

    Raises:
        UserError: If the model's shape cannot be known here, the recipe does not fit it, or a tracker is not here.
    """
    config, published = None, False
    try:
        model_folder(recipe.model)
    except UserError as error:
        config, published = known_config(recipe.model), True
        if config is None:
            raise UserError(
                f"recipe `{recipe.name}`: the configuration of `{recipe.model}` cannot be read here: {error}"
            ) from error
    config = config or read_config(recipe.model)
    check_trackers(recipe.training.report_to)
    model = skeleton(config, recipe.model, None if published else _processor(recipe, config))
    blocks, breaker = recipe.lora.layers_to_transform, recipe.circuit_breaker
    try:
        paths = lora_paths(model, blocks, recipe.lora.modules)
        all_blocks = len(model.decoder_blocks)
        kept = check_targets(breaker.target_layers, blocks, all_blocks, breaker.retain_layers, breaker.retain)
    except ValueError as error:
        raise UserError(f"recipe `{recipe.name}`: {error}") from error
    if recipe.training.picture_cache is not None:
        refuse_cache(recipe.training.picture_cache, model, recipe.batches)
    parameters = adapter_size(model, paths, recipe.lora.r)
    return TrainingPlan(recipe, model, paths, kept, parameters, published, longest_row(model, recipe))


def longest_row(model: ChatModel, recipe: "Recipe") -> int:
    """Tokens of a row of ``max_length`` with, where there are any, one picture of the size that takes most."""
    text = recipe.training.max_length
    return text if recipe.batches == "text" else text + model.largest_picture()


def _processor(recipe: "Recipe", config: Any) -> Any:
    """The model's processor, which may limit pictures; None where it is not here: what training says of it then."""
    try:
        return load_processor(recipe.model, config, recipe.image_backend)
    except UserError:
        return None


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that transformers knows the trackers and that they are installed.

    Raises:
        UserError: Naming the first that is not.
    """
    if not names:
        return
    from transformers.integrations import integration_utils

    here = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            raise unknown("tracker", name, integration_utils.INTEGRATION_TO_CALLBACK)
        if name not in here:
            raise UserError(
                f"`training.report_to` names `{name}`, which is not installed here; install it or leave it out, "
                "metrics.jsonl is written in any case."
            )


def check_device(plan: TrainingPlan) -> None:
    """Make sure that the run's device is there, can attend as asked and is large enough, before anything is loaded.

    Raises:
        UserError: If there is no such GPU, no flash attention where it is asked for, or too little of its memory is
            free (says what would fit).
    """
    import torch

    recipe = plan.recipe
    refuse_absent(recipe.device)
    refuse_attention(recipe.attention, recipe.device, recipe.dtype)
    if not recipe.device.startswith("cuda"):
        return
    free, total = torch.cuda.mem_get_info(recipe.device)
    needed = plan.memory()
    if needed.total <= free:
        return
    smaller = plan.fitting(free)
    advice = f"this would fit: {' '.join(smaller)}" if smaller else "no setting of this recipe would fit"
    raise UserError(
        f"recipe `{recipe.name}` needs about {told_size(needed.total)}, `{recipe.device}` has "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free; {advice}."
    )
