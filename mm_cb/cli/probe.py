"""``mm-cb probe``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mm_cb.cli.options import Adapter, Out, number, requests_for
from mm_cb.core.closing import Hint, files, say, what_next
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.folding import is_blank

EXAMPLE = "Example: mm-cb probe miniature --out runs/probe"
KINDS = ("linear", "mlp")
READ = (
    *("name", "model", "data", "batches", "seed", "device", "dtype", "image_backend", "training.max_length"),
    *("circuit_breaker.target_layers", "circuit_breaker.masks"),
)
"""Fields of a recipe that decide a probe."""


def probe(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Whose model and rows: a shipped recipe's name, or a YAML file.")
    ],
    out: Out,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe fields to change, by dotted name.")
    ] = None,
    adapter: Adapter = None,
    kind: Annotated[str, typer.Option(metavar="K", help=f"{' or '.join(KINDS)} (64 and 32 hidden units).")] = "linear",
    layer: Annotated[int | None, number("layer", "Hidden state to read.  [default: the recipe's last target]")] = None,
    false_positives: Annotated[
        float, number("false_positives", "Share of benign answers that may be withheld.", metavar="R")
    ] = 0.01,
    rows: Annotated[int, number("rows", "At most so many rows of each set.")] = 512,
    refusal: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What is said in place of an answer that is withheld.  [default: a refusal]"),
    ] = None,
) -> None:
    """Train a harmfulness probe, which withholds answers whose hidden states it flags; a baseline and a companion."""
    if kind not in KINDS:
        raise unknown("kind of probe", kind, KINDS)
    if refusal is not None and is_blank(refusal):
        raise UserError("`--refusal` must be a text that is not empty.")
    from mm_cb.training.recipes.recipe import typed_recipe

    chosen: Any = kind
    for key in (change.partition("=")[0].strip() for change in overrides or ()):
        if not any(key == read or key.startswith(f"{read}.") for read in READ):
            raise UserError(
                f"`mm-cb probe` does not read `{key}`: leave it out; of a recipe it reads {', '.join(READ)}."
            )
    read = typed_recipe(recipe, overrides or [])
    from mm_cb.core.progress import Progress
    from mm_cb.training.probe import ProbeSettings, train_probe

    with Progress() as progress:
        settings = ProbeSettings(chosen, layer, false_positives, rows, refusal)
        told = train_probe(read, out, adapter, settings, progress)
    benign, harmful = told["benign"], told["harmful"]
    say(
        f"answers never trained on that it withholds: {benign['flagged']} of {benign['of']} benign (at most "
        f"{told['false_positive_rate']:g} of them), {harmful['flagged']} of {harmful['of']} harmful"
    )
    if told["false_positive_rate"] * benign["of"] < 1:
        say("so few benign answers cannot show so small a share: the threshold lies above all of them")
    files({"probe": out})
    watched: list[str | Path] = ["--model", read.model, *(["--adapter", adapter] if adapter else []), "--probe", out]
    asked = ["eval", "over-refusal", *watched, "--data", "requests.jsonl"]
    attack: list[str | Path] = [
        "attack",
        *watched,
        "--behaviors",
        requests_for(read.model),
        "--attack",
        "all",
        "--out",
        "runs/attack",
    ]
    what_next(
        Hint("attack the model behind it; `pgd_probe`, in `all`, knows it", attack),
        Hint("what it costs; requests.jsonl stands for your benign requests", [*asked, "--out", "runs/benign"]),
    )
