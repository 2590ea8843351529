"""What ``mm-cb train`` does between its options and the training package."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mm_cb.errors import UserError, one_line
from mm_cb.paths import safe_id

if TYPE_CHECKING:
    from mm_cb.training.recipe import Recipe


def list_recipes() -> None:
    """Print the names of the shipped recipes, one a line."""
    from mm_cb.training.recipe import recipe_names

    for name in recipe_names():
        typer.echo(name)


def train_recipe(name_or_path: str, overrides: Sequence[str], out: Path | None) -> None:
    """Train what a recipe says and print the adapter's folder.

    Args:
        name_or_path: A shipped name or a YAML file.
        overrides: ``key=value`` for recipe fields.
        out: Run directory; None = a folder named after the recipe, under ``runs``.
    """
    from mm_cb.training.recipe import load_recipe

    recipe = load_recipe(name_or_path, overrides)
    from mm_cb.progress import Progress, console
    from mm_cb.training.run import train

    with Progress() as progress:
        adapter = train(recipe, Path("runs") / safe_id(recipe.name) if out is None else out, progress=progress)
    console().print(f"adapter: {adapter}")


def show_plan(name_or_path: str, overrides: Sequence[str]) -> None:
    """Print the resolved recipe as YAML and, as comments, every module that would be trained; load no weights."""
    import yaml

    from mm_cb.training.recipe import load_recipe

    recipe = load_recipe(name_or_path, overrides)
    paths, parameters = _trained_modules(recipe)
    typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
    typer.echo(f"# trained: LoRA on {len(paths)} modules of the language tower, {parameters:,} parameters")
    for path in paths:
        typer.echo(f"#   {path}")


def _trained_modules(recipe: "Recipe") -> tuple[list[str], int]:
    """Paths of the layers that would get LoRA, and the size of the adapter, from the model's shape alone."""
    from mm_cb.compat import prepare_torchvision

    prepare_torchvision()
    import torch
    from transformers import AutoConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    from mm_cb.models import LlavaNextModel
    from mm_cb.models.loading import MINIATURE
    from mm_cb.training.placement import check_targets, lora_paths

    source = str(MINIATURE) if recipe.model == "miniature" else recipe.model
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise UserError(
            f"recipe `{recipe.name}`: the configuration of `{recipe.model}` cannot be read here: {one_line(str(e))}"
        ) from e
    if not isinstance(config, LlavaNextConfig):
        raise UserError(f"recipe `{recipe.name}`: `{recipe.model}` must be a LLaVA-NeXT, got {config.model_type}.")
    with torch.device("meta"):
        skeleton = LlavaNextForConditionalGeneration(config)
    no_processor: Any = None  # the shape of the language tower is all that counts
    model = LlavaNextModel(skeleton, no_processor, recipe.model)
    blocks, breaker = recipe.lora.layers_to_transform, recipe.circuit_breaker
    try:
        check_targets(breaker.target_layers, blocks, len(model.decoder_blocks), breaker.retain_layers)
        paths = lora_paths(model, blocks, recipe.lora.modules)
    except ValueError as e:
        raise UserError(f"recipe `{recipe.name}`: {e}") from e
    layers = [model.base.get_submodule(path) for path in paths]
    return paths, sum(recipe.lora.r * (layer.in_features + layer.out_features) for layer in layers)
