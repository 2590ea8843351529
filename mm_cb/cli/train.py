"""``mm-cb train``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.paths import safe_id

if TYPE_CHECKING:
    from mm_cb.training.plan import Plan

EXAMPLE = "Example: mm-cb train miniature --out runs/rr training.max_steps=60"


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Recipe fields to change, by dotted name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/RECIPE]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what would be trained; load no weights.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Short for seed=N.", min=0)] = None,
    device: Annotated[str | None, typer.Option(metavar="D", help="Short for device=D: cpu, cuda, cuda:1.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="Short for dtype=T: float32, bfloat16.")] = None,
) -> None:
    """Train a circuit breaker (a LoRA adapter) from a recipe."""
    if list_:
        _list_recipes()
        return
    if recipe is None:
        raise UserError("`RECIPE` is missing: give a shipped name (see `mm-cb train --list`) or a YAML file.")
    short = [
        f"{key}={value}" for key, value in (("seed", seed), ("device", device), ("dtype", dtype)) if value is not None
    ]
    if dry_run:
        _show_plan(recipe, [*(overrides or []), *short])
    else:
        _train_recipe(recipe, [*(overrides or []), *short], out)


def _list_recipes() -> None:
    """Print the names of the shipped recipes, one a line."""
    from mm_cb.training.recipe import recipe_names

    for name in recipe_names():
        typer.echo(name)


def _train_recipe(name_or_path: str, overrides: Sequence[str], out: Path | None) -> None:
    """Train what a recipe says and print the adapter's folder.

    Args:
        name_or_path: A shipped name or a YAML file.
        overrides: ``key=value`` for recipe fields.
        out: Run directory; None = a folder named after the recipe, under ``runs``.
    """
    from mm_cb.training.recipe import load_recipe

    recipe = load_recipe(name_or_path, overrides)
    from mm_cb.core.progress import Progress, console
    from mm_cb.training.run import train

    with Progress() as progress:
        adapter = train(recipe, Path("runs") / safe_id(recipe.name) if out is None else out, progress=progress)
    console().print(f"adapter: {adapter}")


def _show_plan(name_or_path: str, overrides: Sequence[str]) -> None:
    """Print the resolved recipe as YAML and, as comments, what it would do; load no weights."""
    import yaml

    from mm_cb.training.recipe import load_recipe

    recipe = load_recipe(name_or_path, overrides)
    from mm_cb.training.plan import make_plan

    plan = make_plan(recipe)
    typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
    if plan.published:
        typer.echo(f"# the configuration of {recipe.model} is not on this machine; its published shape is used")
    blocks = len(plan.model.decoder_blocks)
    typer.echo(f"# loaded: decoder blocks 0..{plan.kept.blocks - 1} of {blocks}, no head")
    typer.echo(f"# trained: LoRA on {len(plan.paths)} modules of the language tower, {plan.parameters:,} parameters")
    for path in plan.paths:
        typer.echo(f"#   {path}")
    tokens = max(recipe.training.tokens_per_pass, plan.longest_row)
    typer.echo(f"# memory, estimated for passes of {tokens} tokens (longest row {plan.longest_row}): {plan.memory()}")
    for line in _sample_lines(plan):
        typer.echo(f"# {line}")


def _sample_lines(plan: "Plan") -> Iterator[str]:
    """One decoded example of every source, what counts in its loss in brackets; or one line that says why not."""
    from mm_cb.models.families import load_processor
    from mm_cb.training.inputs import load_examples
    from mm_cb.training.samples import first_of_each_source, marked

    recipe, masks = plan.recipe, plan.recipe.circuit_breaker.masks
    try:
        plan.model.processor = load_processor(recipe.model, plan.model.base.config, recipe.image_backend)
        plan.model.max_length = recipe.training.max_length
        for example in first_of_each_source(load_examples(recipe)):
            title = f"sample of {example.source or 'no named source'} ({example.set}, {example.modality})"
            yield one_line(f"{title}, what counts in brackets:")
            text = marked(plan.model, example, {"text": masks.text, "multimodal": masks.multimodal})
            yield from (f"| {one_line(line)}" for line in text.split("\n"))
    except (UserError, ValueError) as e:
        yield one_line(f"no (more) samples: {e}")
