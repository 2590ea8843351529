"""``mm-cb train``."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_cb.cli.options import number, requests_for
from mm_cb.core.closing import TYPED, Hint, again, command, files, here, say, what_next
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.paths import safe_id
from mm_cb.core.places import refuse_inside_weights
from mm_cb.core.recipe_files import read_recipe
from mm_cb.core.terminal import put

if TYPE_CHECKING:
    from mm_cb.core.records import JsonObject
    from mm_cb.training.planning.plan import TrainingPlan
    from mm_cb.training.recipes.config import Recipe

EXAMPLE = "Example: mm-cb train miniature --out runs/rr training.max_steps=60"


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe fields to change, by dotted name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/RECIPE]")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be trained, and how it would start where weights and data are here.",
        ),
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes by kind.")] = False,
    show: Annotated[str | None, typer.Option(metavar="RECIPE", help="Print a recipe as it is written.")] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="List every recipe field: type, range, default, meaning.")
    ] = False,
    allow_stuck: Annotated[
        bool,
        typer.Option(
            "--allow-stuck",
            help="Exit with 0 where training took no hold, or took too much along (else 2, from 50 steps on).",
        ),
    ] = False,
    loss: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Short for circuit_breaker.loss=NAME; or a Python file that registers one."),
    ] = None,
    seed: Annotated[int | None, number("seed", "Short for seed=N.")] = None,
    device: Annotated[str | None, typer.Option(metavar="D", help="Short for device=D: cpu, cuda, cuda:1.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="T", help="Short for dtype=T: float32, bfloat16, float16.")
    ] = None,
) -> None:
    """Train a circuit breaker (a LoRA adapter) from a recipe."""
    if list_ or fields or show is not None:
        _print(list_, fields, show)
        return
    if recipe is None:
        raise UserError("`RECIPE` is missing: give a shipped name (see `mm-cb train --list`) or a YAML file.")
    short = [
        f"{key}={value}" for key, value in (("seed", seed), ("device", device), ("dtype", dtype)) if value is not None
    ]
    read_recipe(recipe)  # what is no recipe is told before anything heavy is imported
    if loss is not None:
        from mm_cb.training.registry import chosen_loss

        short.append(f"circuit_breaker.loss={chosen_loss(loss).name}")
    changes = [*(overrides or []), *short]
    if dry_run:
        _show_plan(recipe, changes)
    else:
        _train_recipe(recipe, changes, out, allow_stuck)


def _print(list_: bool, fields: bool, show: str | None) -> None:
    """Print what recipes there are, what fields one has, or one as it is written."""
    from mm_cb.core.recipe_files import recipe_text

    if list_:
        _list_recipes()
    if fields:
        from mm_cb.training.recipes.fields import recipe_fields

        for field in recipe_fields():
            typer.echo(f"{field.name}: {field.kind}  [{field.default}]\n    {field.about}")
    if show is not None:
        typer.echo(recipe_text(show), nl=False)


def _list_recipes() -> None:
    """Print the shipped recipes by kind, with what each is, and needs if it does not come with the package."""
    from mm_cb.core.recipe_files import recipe_device, recipe_groups, recipe_model, recipe_purpose

    groups = recipe_groups()
    longest = max(len(name) for group in groups for name in group.names)
    for group in groups:
        data = (
            f"the model, a GPU, {', '.join(group.data)}" if group.data else "nothing: model and data are in the package"
        )
        say(f"{group.kind}: {group.about}; needs {data}", "  ")
        for name in group.names:
            if not group.data:
                say(f"  {name}: {recipe_purpose(name)}", "    ")
                continue
            cpu = " (a CPU does)" if recipe_device(name) == "a CPU" else ""
            put(f"  {name:{longest}}  {recipe_model(name)}{cpu}")
        for name, more in group.further.items():
            say(f"  {name} also needs {', '.join(more)}", "    ")
    say("What one is for, and where each value is from: mm-cb train --show RECIPE. Rows of yours in place of its data:")
    put(command(["train", "RECIPE", "data=[rows.jsonl]", "--out", "runs/rr"]))


def _train_recipe(name_or_path: str, overrides: Sequence[str], out: Path | None, allow_stuck: bool) -> None:
    """Train what a recipe says and print the adapter's folder.

    Args:
        name_or_path: A shipped name or a YAML file.
        overrides: ``key=value`` for recipe fields.
        out: Run directory; None = a folder named after the recipe, under ``runs``.
        allow_stuck: Whether a run that did not take hold is no error.

    Raises:
        UserError: If the run did not take hold; its adapter is written.
    """
    from mm_cb.training.recipes.recipe import typed_recipe

    recipe = typed_recipe(name_or_path, overrides)
    out = Path("runs") / safe_id(recipe.name) if out is None else out
    refuse_inside_weights(out, [recipe.model])
    from mm_cb.core.progress import Progress
    from mm_cb.core.runs import read_jsonl
    from mm_cb.training.outcome import ENOUGH_STEPS, STUCK, DidNotTakeHold
    from mm_cb.training.run import train

    with Progress() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", DidNotTakeHold)  # said below
        adapter = train(recipe, out, progress=progress)
    if os.environ.get("RANK", "0") != "0":  # under a launcher the first process speaks
        return
    records = read_jsonl(adapter / "metrics.jsonl")
    stuck = records[-1].get(STUCK) if records else None
    steps = records[-1]["step"] + 1 if records else 0
    _show_held_out(recipe, records)
    files({"adapter": adapter})
    if stuck is not None and steps < ENOUGH_STEPS:
        say(f"{steps} steps are a try, too short for what is expected above: training.max_steps=N makes it longer.")
    elif stuck is not None and not allow_stuck:
        what_next(*_mended(stuck, adapter))
        raise UserError(f"{stuck}, or take the adapter in `{adapter}` as it is with --allow-stuck.")
    elif stuck is not None:
        warnings.warn(stuck, stacklevel=2)
    what_next(
        Hint(_attack_step(recipe), _attack_of(recipe, adapter)),
        Hint(f"what it was trained on and how that went: {here(adapter / 'README.md')}", []),
    )


def _attack_step(recipe: "Recipe") -> str:
    yours = "; behaviors.jsonl stands for your requests" if _requests(recipe) == "behaviors.jsonl" else ""
    return f"attack it: what it still gives away, and the table{yours}"


def _requests(recipe: "Recipe") -> str:
    """The embedded model's own requests for a breaker of its own rows; else a file that stands for the user's."""
    return requests_for(recipe.model) if isinstance(recipe.data, str) else "behaviors.jsonl"


def _mended(stuck: str, adapter: Path) -> "Iterator[Hint]":
    """What to type after a run that did not take hold: what its message names, or to take the adapter as it is."""
    settings = re.findall(r"[\w.]+=[\w.+-]*\w", stuck)
    folder = str(adapter)
    if words := again({"--out": f"{folder}-again"}, settings):
        yield Hint("train again with what should help; or with more rows (docs/formats.md)", words)
        yield Hint("take this adapter as it is", again({"--out": folder}, ["--allow-stuck"]))
    yield Hint(f"what it was trained on and how that went: {here(adapter / 'README.md')}", [])


def _attack_of(recipe: "Recipe", adapter: Path) -> list[str | Path]:
    """The attack command for an adapter."""
    words: list[str | Path] = [
        "attack",
        "--model",
        recipe.model,
        "--adapter",
        adapter,
        "--behaviors",
        _requests(recipe),
        "--attack",
        "all",
    ]
    device = ["--device", recipe.device] if recipe.device != "cpu" else []
    dtype = [] if recipe.dtype == "float32" else ["--dtype", recipe.dtype]
    return [*words, *device, *dtype, "--out", "runs/attack-rr"]


def _show_held_out(recipe: "Recipe", records: "Sequence[JsonObject]") -> None:
    """Print where rows that were never trained on were at the start and are at the end, and where they should be."""
    measured = [record for record in records if "held_out_retain_cosine" in record]
    if not measured:
        for begun, ended in zip(records[:1], records[-1:], strict=True):
            losses = (
                f"reroute {ended['reroute_loss']:.3f} ({begun['reroute_loss']:.3f} at the first step), "
                f"retain {ended['retain_loss']:.3f} ({begun['retain_loss']:.3f})"
            )
            say(f"losses of the last step, where low is good: {losses}")
            say("No rows were held out (training.held_out): an attack tells whether it took hold.")
        return
    from rich.table import Table

    from mm_cb.core.progress import print_whole
    from mm_cb.training.outcome import KEPT, WHAT_COSINE_SAYS
    from mm_cb.training.registry import loss_entry

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(("rows never trained on", "start", "end", "expected", "")):
        table.add_column(head, justify="right" if place in (1, 2) else "left")
    rows = {"circuit_breaker": loss_entry(recipe.circuit_breaker.loss).hold, "retain": KEPT}
    for name, hold in rows.items():
        first, last = (float(record[f"held_out_{name}_{hold.measure}"]) for record in (measured[0], measured[-1]))
        title = f"{name.replace('_', ' ')}: {hold.measure.replace('_', ' ')} to base"
        met = "met" if hold.holds(last) else "NOT met"
        table.add_row(title, f"{first:.3f}", f"{last:.3f}", hold.expected, met)
    print_whole(table)
    say(WHAT_COSINE_SAYS)


def _show_plan(name_or_path: str, overrides: Sequence[str]) -> None:
    """Print what a recipe would do, how it would start, and which fields are not as the recipe has them."""
    from mm_cb.training.recipes.recipe import typed_recipe

    recipe = typed_recipe(name_or_path, overrides)
    from mm_cb.training.inputs import unfetched
    from mm_cb.training.planning.plan import make_plan

    absent = unfetched(recipe)
    plan = make_plan(recipe)
    for lines in (_plan_lines, _sample_lines, _start_lines):
        for line in lines(plan):
            typer.echo(line)
    changed = f"changed here: {', '.join(overrides)}; the other fields are" if overrides else "all fields are"
    say(one_line(f"{changed} the recipe's and, where it names none, the defaults (mm-cb train --fields)"))
    what_next(
        Hint("the recipe as it is written, with where its values are from", ["train", "--show", name_or_path]),
        Hint(one_line(f"training cannot begin yet: {absent[0]}"), [])
        if absent
        else Hint("train; its run.json keeps every field", [word for word in TYPED if word != "--dry-run"]),
    )


def _plan_lines(plan: "TrainingPlan") -> Iterator[str]:
    """What would be trained, by what loss, and the memory that it takes."""
    from mm_cb.training.placement import in_one_line
    from mm_cb.training.registry import loss_entry

    recipe, options, breaker = plan.recipe, plan.recipe.training, plan.recipe.circuit_breaker
    loss, settings = loss_entry(breaker.loss), "".join(f", {k} {v:g}" for k, v in breaker.loss_settings.items())
    yield one_line(f"{recipe.name}: {recipe.model}, {options.max_steps} steps of {options.batch_size} rows of each set")
    if plan.published:
        yield f"the configuration of {recipe.model} is not on this machine; its published shape is used"
    yield f"loss {loss.name}{settings}: {loss.about}"
    yield f"  {loss.source}"
    yield f"  alpha {breaker.alpha:g}, at hidden states {breaker.target_layers}, retain loss {breaker.retain}"
    if breaker.keep_length:
        yield f"  beside it, not in the paper: states keep their length (keep_length {breaker.keep_length:g})"
    if breaker.adversary.steps:
        yield f"  not in the paper: an adversary moves pictures' embeddings, {breaker.adversary.steps} steps"
    yield f"trained: LoRA on {len(plan.paths)} modules of the language tower, {plan.parameters:,} parameters"
    yield f"  {in_one_line(plan.model, plan.paths)}"
    head = "the head" if plan.kept.head else "no head"
    yield f"loaded: decoder blocks 0..{plan.kept.blocks - 1} of {len(plan.model.decoder_blocks)}, {head}"
    tokens = max(options.tokens_per_pass, plan.longest_row)
    parts = f"training.max_length {options.max_length}"
    if plan.longest_row > options.max_length:
        parts += f" and the largest picture's {plan.longest_row - options.max_length}"
    yield f"memory, estimated for passes of {tokens} tokens: {plan.memory()}"
    yield f"  no row has more than {plan.longest_row} tokens: {parts}"


def _sample_lines(plan: "TrainingPlan") -> Iterator[str]:
    """One decoded example of every source, what counts in its loss in brackets; one line where that is not here.

    What is here and cannot be trained on is refused, as training refuses it.
    """
    from mm_cb.models.cache import model_folder
    from mm_cb.models.families import has_tokenizer, load_processor
    from mm_cb.training.inputs import load_examples, unfetched
    from mm_cb.training.planning.preflight import check_draw
    from mm_cb.training.planning.samples import first_of_each_source, marked

    recipe, masks = plan.recipe, plan.recipe.circuit_breaker.masks
    if absent := unfetched(recipe):
        yield one_line(f"no samples: {absent[0]}")
        return
    check_draw(examples := load_examples(recipe), recipe)
    if plan.published or not has_tokenizer(model_folder(recipe.model)):
        yield f"no samples: the processor of {recipe.model} is not on this machine"
        return
    plan.model.processor = load_processor(recipe.model, plan.model.base.config, recipe.image_backend)
    plan.model.max_length = recipe.training.max_length
    for example in first_of_each_source(examples):
        title = f"sample of {example.source or 'no named source'} ({example.set}, {example.modality})"
        yield one_line(f"{title}, what counts in brackets:")
        text = marked(plan.model, example, masks.by_modality)
        yield from (f"| {one_line(line)}" for line in text.split("\n"))


def _start_lines(plan: "TrainingPlan") -> Iterator[str]:
    """What would be measured before the first step; or one line that says why it was not."""
    from mm_cb.training.run import measure_start
    from mm_cb.training.start import start_lines

    try:
        yield from map(one_line, start_lines(measure_start(plan)))
    except (UserError, ValueError) as e:
        yield one_line(f"how it would start was not measured: {e}")
