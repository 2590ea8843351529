"""``mm-cb data build``: what is not published, made from the user's copies and by the user's models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_cb.cli.groups import Command, Group
from mm_cb.cli.options import Behaviors, Seed, known_dtype, number
from mm_cb.core.closing import Hint, files, here, what_next
from mm_cb.core.errors import UserError

if TYPE_CHECKING:
    from mm_cb.data.asked import Counts

build = typer.Typer(
    help="Build what is not published: the multimodal pairs, tool calls, the behaviours, harmless targets.",
    rich_markup_mode=None,
    cls=Group,
)


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
    left_out = {
        "left out": built.missing,
        "left out, asked before": built.repeated,
        "left out, of categories that are not taken": built.others,
    }
    for title, lines in {"wrong file names": built.renamed, **left_out}.items():
        if lines:
            console().print(f"{title}: {len(lines)}, the first:")
            for line in lines[:5]:
                console().print(f"  {line}")
    files({"behaviours": built.path})
    _attack_next(built.path)


@build.command("benign", cls=Command, epilog="Example: mm-cb data build benign --behaviors miniature --out benign")
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
    max_tokens: Annotated[int, number("max_tokens", "Longest answer, in tokens.")] = 1024,
    temperature: Annotated[
        float, number("generator_temperature", "Temperature of the generator.", metavar="T", flag="--temperature")
    ] = 1.0,
    concurrency: Annotated[int, number("concurrency", "Requests at the same time.")] = 8,
    timeout: Annotated[float, number("timeout", "Longest silence of a server, in seconds.", metavar="S")] = 60,
    retries: Annotated[int, number("retries", "Further tries of a failed request.")] = 5,
    device: Annotated[
        str, typer.Option(metavar="D", help="Device of a describer that runs here: cpu, cuda, cuda:1.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="T", help="The same: float32, bfloat16, float16.", callback=known_dtype)
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
    from mm_cb.core.reading import read_plain
    from mm_cb.data import describe, pairs
    from mm_cb.data.contamination import read_tested
    from mm_cb.data.sources import Source

    chosen: Any = Source("pairs", set=set_).set  # type: ignore[arg-type]  # checked there
    text = read_plain(template, "template")
    recipe = pairs.PairRecipe(describer, generator, text, chosen, limit, attempts, max_tokens, temperature, seed)
    prompts = [one.prompt for file in behaviors or [] for one in read_tested(file)]
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
    _told(built, built.pairs, f"{built.pictures} pictures", out)
    what_next(
        Hint("read what would be trained on", ["data", "check", built.path]),
        Hint("then name the file under `data` of a recipe", ["train", "--show", "llava-next-mistral-7b"]),
    )


@build.command(
    cls=Command,
    name="calls",
    epilog="Example: mm-cb data build calls --functions functions.jsonl --request-template ask.txt "
    "--call-template do.txt --requester-url http://localhost:8000/v1 --requester NAME --out calls",
)
def build_calls(
    functions: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with `tools`; training rows with tools are such.")
    ],
    request_template: Annotated[
        Path, typer.Option(metavar="FILE", help="What the requester is told; {functions} stands for the definitions.")
    ],
    call_template: Annotated[
        Path, typer.Option(metavar="FILE", help="What the executor is told; with {functions} and {request}.")
    ],
    requester_url: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible address of the requester.")],
    requester: Annotated[str, typer.Option(metavar="M", help="The name there of who writes requests.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets calls.jsonl; an existing one is gone on with.")],
    executor_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of the executor.  [default: the requester's]")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="M", help="The name there of who carries requests out.  [default: the requester]"),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What is evaluated (JSONL with `prompt`, HarmBench CSV): BLEU > 0.1 goes."),
    ] = None,
    set_: Annotated[str, typer.Option("--set", metavar="S", help="circuit_breaker or retain.")] = "circuit_breaker",
    style: Annotated[
        str,
        typer.Option(metavar="S", help="tools: rows with tools and calls; prompt: texts, for templates without tools."),
    ] = "tools",
    format_: Annotated[
        str,
        typer.Option("--format", metavar="F", help="How the executor writes calls: python, hermes, mistral, llama."),
    ] = "python",
    limit: Annotated[int | None, number("limit", "A seeded sample of the lines.")] = None,
    attempts: Annotated[int, number("attempts", "Answers to a question before it is given up.")] = 3,
    max_tokens: Annotated[int, number("max_tokens", "Longest answer, in tokens.")] = 1024,
    temperature: Annotated[
        float, number("generator_temperature", "Temperature of both.", metavar="T", flag="--temperature")
    ] = 1.0,
    concurrency: Annotated[int, number("concurrency", "Requests at the same time.")] = 8,
    timeout: Annotated[float, number("timeout", "Longest silence of a server, in seconds.", metavar="S")] = 60,
    retries: Annotated[int, number("retries", "Further tries of a failed request.")] = 5,
    seed: Seed = 0,
) -> None:
    """Make rows of tool calls: one model writes requests over given functions, another carries them out.

    The requester must answer with a JSON object of request, the executor with calls that the functions' schemas allow.
    Every answer is kept as it comes; exit code 2 while some are missing, and the same command asks for these again.
    What the models are told is yours. Keys are read from the environment variable MM_CB_API_KEY.
    """
    from functools import partial

    from mm_cb.core.endpoint import Endpoint
    from mm_cb.core.progress import Progress, console
    from mm_cb.core.reading import read_plain
    from mm_cb.data import built_calls
    from mm_cb.data.contamination import read_tested
    from mm_cb.data.sources import Source

    chosen: Any = Source("calls", set=set_).set  # type: ignore[arg-type]  # checked there
    texts = read_plain(request_template, "template"), read_plain(call_template, "template")
    names = requester, executor or requester
    recipe = built_calls.CallRecipe(
        *names, *texts, chosen, style, format_, limit, attempts, max_tokens, temperature, seed
    )
    evaluated = [one.prompt for file in evaluation or [] for one in read_tested(file)]
    connect = partial(Endpoint, timeout=timeout, retries=retries, concurrency=concurrency)
    with Progress() as progress:
        built = built_calls.build_calls(
            functions,
            out,
            recipe,
            requester=connect(requester_url, names[0]),
            executor=connect(executor_url or requester_url, names[1]),
            evaluated=evaluated,
            progress=progress,
        )
    console().print(f"rows: {built.rows} of {built.functions} lists of functions, in {built.path}")
    _told(built, built.rows, f"{built.functions} lists of functions", out)
    what_next(
        Hint("read what would be trained on", ["data", "check", built.path]),
        Hint("then name the file under `data` of a recipe", ["train", "--show", "llama-3-8b-instruct-agents"]),
    )


def _told(built: "Counts", made: int, of: str, out: Path) -> None:
    """Say which answers were not used, and end with those that are missing, or where none was of use."""
    from mm_cb.core.progress import console
    from mm_cb.data.sources import count_reasons

    if built.rejected:
        console().print(f"not used: {count_reasons(built.rejected)}")
    if left := sum(built.left.values()):
        raise UserError(
            f"{built.stopped} {left} of {of} have no answer yet ({count_reasons(built.left)}; why is in "
            f"{out / 'failures.jsonl'}); run the same command again to ask for these alone."
        )
    if not made:
        raise UserError(
            f"nothing was built of {of}: every answer was refused or of no use (the counts stand above); look at the "
            f"answers in `{out}`, change the template or the models, and take another `--out`."
        )


def _attack_next(behaviors: Path) -> None:
    """What to type next with a behaviours file."""
    attack: list[str | Path] = ["attack", "--model", "MODEL", "--behaviors", behaviors, "--out", "runs/attack"]
    what_next(Hint("attack with them", attack))
