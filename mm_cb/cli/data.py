"""``mm-cb data``: what data there is, whether it is fit to train on, and building what is not published."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_cb.cli.data_build import build
from mm_cb.cli.groups import Command
from mm_cb.cli.options import number
from mm_cb.core.closing import Hint, say, shell, what_next
from mm_cb.core.errors import UserError
from mm_cb.core.folders import but_is

if TYPE_CHECKING:
    from mm_cb.data.check import Report
    from mm_cb.training.recipes.config import Recipe

EXAMPLE = "Example: mm-cb data check miniature --behaviors miniature"

app = typer.Typer(help="List data sets, check them before a run, build the unpublished ones.", rich_markup_mode=None)


app.add_typer(build, name="build")


@app.command("list", cls=Command, epilog="Example: mm-cb data list")
def list_() -> None:
    """List the data sets that have a card: what for, licence, and whether they are on this machine."""
    from mm_cb.core.paths import data_path
    from mm_cb.core.terminal import put
    from mm_cb.data.cards import cards, whereabouts

    for card in cards().values():
        there, detail = whereabouts(card)
        put(f"{card.name} ({'here' if there else 'not here'}; for {card.used_for})")
        for line in (card.summary, f"licence: {card.licence}", f"from {card.source}", detail):
            say(f"    {line}", "    ")
        for line in () if there else card.how:
            put(shell(line, "    "))
    say("A small file in every format that is read, with its command:")
    put(f"  {data_path('examples', 'README.md')}")
    what_next(Hint("read all that a recipe would read, or a file of yours", ["data", "check", "RECIPE"]))


@app.command("check", cls=Command, epilog=EXAMPLE)
def check(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE_OR_FILES", help="A recipe with key=value, or data sets, files, folders, hub:ORG/NAME."
        ),
    ],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the pictures, for data that only names them.")
    ] = None,
    set_: Annotated[
        str | None, typer.Option("--set", metavar="S", help="circuit_breaker or retain, for data of either.")
    ] = None,
    behaviors: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Behaviours to be tested with (JSONL, HarmBench CSV): BLEU > 0.3 is an error."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="M", help="Count tokens of this model instead of words.")
    ] = None,
    max_length: Annotated[
        int | None, number("max_length", "Tokens kept of an example.  [default: the recipe's, or 1024]")
    ] = None,
    seed: Annotated[int | None, number("seed", "Decides samples.  [default: the recipe's, or 0]")] = None,
) -> None:
    """Read all that a run would read and report what is wrong: file, line, count. Exit code 2 if there are errors.

    A recipe, with fields behind it as `mm-cb train` takes them, is refused for what `mm-cb train` refuses, and for
    nothing else: broken rows, missing or corrupt pictures, repeated ids, texts in both sets, rows that the model cannot
    take or of which its `max_length` leaves nothing that counts, sets without rows. So is contamination by test
    behaviours, where these are given. Duplicates, examples that training cuts and rows of words
    that the model's tokenizer does not have are warnings. Files with --tokenizer M are held to what the shipped recipe
    of M takes, or else the paper's; without, lengths are counted in words. All pictures are opened; `mm-cb train` opens
    those of the rows that it draws, before its first step.
    """
    from mm_cb.core.progress import Progress
    from mm_cb.data.check import Limits, check_sources
    from mm_cb.data.contamination import read_tested
    from mm_cb.data.sources import STRICT, Source

    recipe = _recipe(what)
    tested = [one for file in behaviors or [] for one in read_tested(file)]
    if recipe is not None:
        if images is not None or set_ is not None:
            raise UserError("`--images` and `--set` are for data files; a recipe names both for each data source.")
        changed = {"training": recipe.training.model_copy(update={"max_length": max_length})} if max_length else {}
        recipe = recipe.model_copy(update={**changed, **({} if seed is None else {"seed": seed})})
        max_length = recipe.training.max_length
    if tokenizer is not None:
        _refuse_absent(tokenizer)
    limits = Limits(tested, max_length or 1024, _tokens_of(tokenizer) if recipe and tokenizer else None)
    with Progress() as progress:
        if recipe is not None:
            from mm_cb.training.planning.preflight import check_recipe

            report = check_recipe(recipe, limits, progress)
        else:
            sources = [Source(name, set=set_, images=images) for name in what]  # type: ignore[arg-type]  # checked there
            rules = STRICT
            if tokenizer is not None:
                from mm_cb.training.planning.preflight import rules_for

                rules = rules_for(tokenizer, limits.max_length)
            report = check_sources(sources, limits, seed=seed or 0, rules=rules, progress=progress)
    _show(report)
    if report.has_errors:
        raise typer.Exit(2)
    if recipe is not None:
        plan = Hint("what would be trained on it, and the memory", ["train", *what, "--dry-run"])
        what_next(plan, Hint("train", ["train", *what]))
    else:
        complete = report.complete
        fields = [f"data=[{','.join(what)}]", *([f"batches={complete[0]}"] if len(complete) == 1 else [])]
        ours = Hint("train on them, by the recipe that `mm-cb doctor --model M` names", ["train", "RECIPE", *fields])
        other = "files of other formats stand under `data` of a recipe: mm-cb train --show RECIPE > mine.yaml"
        if not complete:
            ours = Hint("training takes rows of both sets: check the file of the other one with it", [])
        what_next(ours if report.own else Hint(other, []))


def _recipe(what: list[str]) -> "Recipe | None":
    """The recipe that the arguments name, with its fields as `mm-cb train` takes them, if they name one."""
    from mm_cb.core.recipe_files import is_recipe_path, recipe_names
    from mm_cb.training.recipes.recipe import typed_recipe

    is_recipe = what[0] in recipe_names() or is_recipe_path(what[0])
    return typed_recipe(what[0], what[1:]) if is_recipe else None


def _refuse_absent(model: str) -> None:
    """Refuse a model whose tokenizer is not on this machine; the hub is not asked for one."""
    from mm_cb.models.families import tokenizer_is_here

    if not tokenizer_is_here(model):
        raise UserError(
            f"`--tokenizer` must name a model whose tokenizer is on this machine, got `{model}`{but_is(model)}; give "
            "its folder, or leave `--tokenizer` out, and lengths are counted in words."
        )


def _tokens_of(model: str) -> Callable[[str], int]:
    """Counts the tokens of texts as a model does that is not the recipe's."""
    from mm_cb.data.unknown import Words
    from mm_cb.models.families import load_tokenizer

    return Words(load_tokenizer(model)).length


def _show(report: "Report") -> None:
    """Print counts, then every kind of problem with its first offenders."""
    from mm_cb.core.progress import console
    from mm_cb.data.check import ERRORS, WARNINGS
    from mm_cb.data.sources import count_reasons

    out = console()
    for name, counts in report.used.items():
        left_out = count_reasons(report.skipped.get(name, type(counts)()))
        used = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        out.print(f"{name}: {used}" + (f"; left out by rule: {left_out}" if left_out else ""))
    out.print(f"picture files opened: {report.images}")
    for severity, kinds in (("error", ERRORS), ("warning", WARNINGS)):
        for kind in kinds:
            if kind in report.problems:
                problem = report.problems[kind]
                out.print(f"{severity}: {kind}: {problem.count}")
                for line in problem.first:
                    out.print(f"  {line}")
                if problem.count > len(problem.first):
                    out.print(f"  and {problem.count - len(problem.first)} more")
    if not report.problems:
        out.print("nothing wrong found")
