"""``mm-cb data``: what data there is, whether it is fit to train on, and building what is not published."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_cb.cli.groups import Command, Group
from mm_cb.cli.options import Behaviors, Seed, known_dtype, number
from mm_cb.core.closing import Step, files, here, say, shell, what_next
from mm_cb.core.errors import UserError, one_line

if TYPE_CHECKING:
    from mm_cb.data.check import Limits, Report
    from mm_cb.training.recipes.config import Recipe

EXAMPLE = "Example: mm-cb data check llava_instruct_150k.json --images coco/train2017 --behaviors behaviors.jsonl"

app = typer.Typer(help="List data sets, check them before a run, build the unpublished ones.", rich_markup_mode=None)


@app.command("list", cls=Command, epilog="Example: mm-cb data list")
def list_() -> None:
    """List the data sets that have a card: what for, licence, and whether they are on this machine."""
    from mm_cb.core.terminal import put
    from mm_cb.data.cards import cards, whereabouts

    for card in cards().values():
        there, detail = whereabouts(card)
        put(f"{card.name} ({'here' if there else 'not here'}; for {card.used_for})")
        for line in (card.summary, f"licence: {card.licence}", f"from {card.source}", detail):
            say(f"    {line}", "    ")
        for line in () if there else card.how:
            put(shell(line, "    "))


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
    behaviours, where these are given. Duplicates and examples that training cuts are warnings. Without a recipe or
    --tokenizer, lengths are counted in words. All pictures are opened; `mm-cb train` opens those of the rows that it
    draws, before its first step.
    """
    from mm_cb.core.progress import Progress
    from mm_cb.data.check import check_sources
    from mm_cb.data.contamination import read_prompts
    from mm_cb.data.sources import STRICT, Source

    recipe = _recipe(what)
    prompts = [prompt for file in behaviors or [] for prompt in read_prompts(file)]
    if recipe is not None:
        if images is not None or set_ is not None:
            raise UserError("`--images` and `--set` are for data files; a recipe names both for each data source.")
        changed = {"training": recipe.training.model_copy(update={"max_length": max_length})} if max_length else {}
        recipe = recipe.model_copy(update={**changed, **({} if seed is None else {"seed": seed})})
        max_length = recipe.training.max_length
    length, model = max_length or 1024, tokenizer or (recipe.model if recipe else None)
    limits = _limits(prompts, model, length, required=tokenizer is not None)
    with Progress() as progress:
        if recipe is not None:
            from mm_cb.training.planning.preflight import check_recipe

            report = check_recipe(recipe, limits, progress)
        else:
            sources = [Source(name, set=set_, images=images) for name in what]  # type: ignore[arg-type]  # checked there
            rules = STRICT
            if tokenizer is not None:
                from mm_cb.training.planning.preflight import rules_for

                rules = rules_for(tokenizer, length)
            report = check_sources(sources, limits, seed=seed or 0, rules=rules, progress=progress)
    _show(report)
    if report.has_errors:
        raise typer.Exit(2)
    if recipe is not None:
        plan = Step("what would be trained on it, and the memory", ["train", *what, "--dry-run"])
        what_next(plan, Step("train", ["train", *what]))
    else:
        ours = [f"data=[{','.join(what)}]"]
        what_next(
            Step("rows of our format, with the recipe that `mm-cb doctor --model M` names", ["train", "RECIPE", *ours]),
            Step("files of other formats stand under `data` of a recipe: mm-cb train --show RECIPE > mine.yaml", []),
        )


def _recipe(what: list[str]) -> "Recipe | None":
    """The recipe that the arguments name, with its fields as `mm-cb train` takes them, if they name one."""
    from mm_cb.core.recipe_files import recipe_names
    from mm_cb.training.recipes.recipe import load_recipe

    is_recipe = what[0] in recipe_names() or what[0].endswith((".yaml", ".yml"))
    return load_recipe(what[0], what[1:]) if is_recipe else None


def _limits(prompts: list[str], model: str | None, max_length: int, required: bool) -> "Limits":
    """Lengths in tokens where the model's tokenizer is on this machine, else in words."""
    from mm_cb.data.check import Limits

    if model is None:
        return Limits(prompts, max_length=max_length)
    from mm_cb.core.compat import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoTokenizer

    from mm_cb.core.embedded import embedded

    guest = embedded(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model if guest is None else guest.weights, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a library makes of a damaged file, it is the file's
        if required:
            said = one_line(str(error))[:200]
            raise UserError(f"`--tokenizer` must name a model whose tokenizer is on this machine: {said}") from error
        return Limits(prompts, max_length=max_length)
    return Limits(prompts, lambda text: len(tokenizer(text).input_ids), max_length, "tokens")


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


build = typer.Typer(
    help="Build what is not published: the multimodal pairs, the behaviours, harmless targets.",
    rich_markup_mode=None,
    cls=Group,
)
app.add_typer(build, name="build")


@build.command(
    cls=Command,
    name="behaviors",
    epilog="Example: mm-cb data build behaviors --harmbench HarmBench --mm-safetybench MM-SafetyBench --out behaviors",
)
def build_behaviors(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets behaviors.jsonl and images/.")],
    harmbench: Annotated[Path | None, typer.Option(metavar="DIR", help="Your clone of HarmBench.")] = None,
    mm_safetybench: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your clone of MM-SafetyBench, with its pictures.")
    ] = None,
    variant: Annotated[
        str, typer.Option(metavar="V", help="MM-SafetyBench's pictures: SD_TYPO, SD or TYPO.")
    ] = "SD_TYPO",
    target: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Target where the data set has none.  [default: an opening]")
    ] = None,
    scenarios: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON object, name in the data set -> scenario; only these."),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out behaviours whose picture is missing or damaged.")
    ] = False,
) -> None:
    """Convert your copies of HarmBench-multimodal and MM-SafetyBench-Tiny to one file of seven scenarios."""
    from mm_cb.core.progress import console
    from mm_cb.data import behaviors
    from mm_cb.data.behaviors_file import read_behaviors

    built = behaviors.build_behaviors(
        out,
        harmbench=harmbench,
        mm_safetybench=mm_safetybench,
        variant=variant,
        target=behaviors.TARGET if target is None else target,
        scenarios=None if scenarios is None else behaviors.read_scenarios(scenarios),
        skip_missing=skip_missing,
    )
    read_behaviors(built.path)
    for (source, scenario), count in sorted(built.counts.items()):
        console().print(f"{source}: {scenario}: {count}")
    for title, lines in (("wrong file names", built.renamed), ("left out", built.missing)):
        if lines:
            console().print(f"{title}: {len(lines)}, the first:")
            for line in lines[:5]:
                console().print(f"  {line}")
    files({"behaviours": built.path})
    _attack_next(built.path)


@build.command(
    "benign", cls=Command, epilog="Example: mm-cb data build benign --behaviors behaviors.jsonl --out benign"
)
def build_benign(
    behaviors: Behaviors,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets behaviors.jsonl and images/.")],
    targets: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Harmless sentences, one a line.  [default: image_attacks.BENIGN_TARGETS]"),
    ] = None,
) -> None:
    """Give the same requests and pictures harmless targets: then an attack's strength needs no judge.

    Attack the new file as any other; results.json holds `target_prefix`, the share of behaviours of which an answer
    starts with its target, word for word. A model with few words (the miniature) needs targets of its own words.
    """
    from image_attacks import BENIGN_TARGETS
    from mm_cb.core.progress import console
    from mm_cb.data.behaviors_file import read_behaviors
    from mm_cb.data.benign import build_benign, read_targets

    sentences = BENIGN_TARGETS if targets is None else read_targets(targets)
    count = len(read_behaviors(build_benign(behaviors, out, sentences)))
    console().print(f"{count} behaviours with harmless targets: {here(out / 'behaviors.jsonl')}")
    _attack_next(out / "behaviors.jsonl")


@build.command(
    cls=Command,
    name="pairs",
    epilog="Example: mm-cb data build pairs --images coco --template my.txt --describer miniature "
    "--generator-url http://localhost:8000/v1 --generator NAME --out pairs",
)
def build_pairs(
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of pictures.")],
    template: Annotated[
        Path, typer.Option(metavar="FILE", help="What the generator is told; {description} stands for a picture's.")
    ],
    describer: Annotated[
        str, typer.Option(metavar="M", help="Model that describes: hub id, folder, or a name at a server.")
    ],
    generator_url: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible address of the generator.")],
    generator: Annotated[str, typer.Option(metavar="M", help="The generator's name there.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets pairs.jsonl; an existing one is gone on with.")],
    describer_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of the describer.  [default: run it here]")
    ] = None,
    behaviors: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Behaviours to be tested with: queries too close go.")
    ] = None,
    set_: Annotated[str, typer.Option("--set", metavar="S", help="circuit_breaker or retain.")] = "circuit_breaker",
    limit: Annotated[int | None, number("limit", "A seeded sample of the pictures.")] = None,
    attempts: Annotated[int, number("attempts", "Answers per picture before it is given up.")] = 3,
    max_tokens: Annotated[int, number("max_tokens", "Longest answer.")] = 1024,
    temperature: Annotated[
        float, number("generator_temperature", "Of the generator.", metavar="T", flag="--temperature")
    ] = 1.0,
    concurrency: Annotated[int, number("concurrency", "Requests at the same time.")] = 8,
    timeout: Annotated[float, number("timeout", "Longest silence of a server, in seconds.", metavar="S")] = 60,
    retries: Annotated[int, number("retries", "Further tries of a failed request.")] = 5,
    device: Annotated[str, typer.Option(metavar="D", help="Of a describer that runs here.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="T", help="Of a describer that runs here.", callback=known_dtype)
    ] = "float32",
    seed: Seed = 0,
) -> None:
    """Make image-text pairs: a model describes pictures, a generator writes query and completion by your template.

    The generator must answer with a JSON object of query and completion. Every answer is kept as it comes. A request
    that fails for good costs its own picture alone; exit code 2 while there are any, and the same command asks for
    these again. Keys are read from the environment variable MM_CB_API_KEY.
    """
    from functools import partial

    from mm_cb.core.endpoint import Endpoint
    from mm_cb.core.progress import Progress, console
    from mm_cb.core.reading import read_text
    from mm_cb.data import describe, pairs
    from mm_cb.data.contamination import read_prompts
    from mm_cb.data.sources import Source, count_reasons

    chosen: Any = Source("pairs", set=set_).set  # type: ignore[arg-type]  # checked there
    text = read_text(template, "template")
    recipe = pairs.PairRecipe(describer, generator, text, chosen, limit, attempts, max_tokens, temperature, seed)
    prompts = [prompt for file in behaviors or [] for prompt in read_prompts(file)]
    connect = partial(Endpoint, timeout=timeout, retries=retries, concurrency=concurrency)
    if describer_url is None:
        from mm_cb.models import TextModel, load_model

        model = load_model(describer, device=device, dtype=dtype)
        if isinstance(model, TextModel):
            raise UserError(f"`--describer` must see pictures, `{describer}` is a model of text alone.")
        describing: Any = partial(describe.describe_by_model, model)
    else:
        describing = partial(describe.describe_by_endpoint, connect(describer_url, describer))
    with Progress() as progress:
        built = pairs.build_pairs(
            images,
            out,
            recipe,
            describe=describing,
            generator=connect(generator_url, generator),
            behaviors=prompts,
            progress=progress,
        )
    console().print(f"pairs: {built.pairs} of {built.pictures} pictures, in {built.path}")
    if built.rejected:
        console().print(f"not used: {count_reasons(built.rejected)}")
    if left := sum(built.left.values()):
        raise UserError(
            f"{built.stopped} {left} of {built.pictures} pictures have no answer yet ({count_reasons(built.left)}; why "
            f"is in {out / 'failures.jsonl'}); run the same command again to ask for these alone."
        )
    what_next(
        Step("read what would be trained on", ["data", "check", built.path]),
        Step("then name the file under `data` of a recipe", ["train", "--show", "llava-next-mistral-7b"]),
    )


def _attack_next(behaviors: Path) -> None:
    """What to type next with a behaviours file."""
    attack: list[str | Path] = ["attack", "--model", "MODEL", "--behaviors", behaviors, "--out", "runs/attack"]
    what_next(Step("attack with them", attack))
