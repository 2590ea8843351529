"""``mm-cb merge``."""

from pathlib import Path
from typing import Annotated

import typer

from mm_cb.cli.options import Model, known_dtype, requests_for
from mm_cb.core.closing import Hint, files, what_next

EXAMPLE = "Example: mm-cb merge --model llava-hf/llava-v1.6-mistral-7b-hf --adapter runs/rr --out merged"


def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(metavar="A", help="Directory of a PEFT adapter.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write; must be new or empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="T", help="float32, bfloat16, float16.  [default: the model's own]", callback=known_dtype),
    ] = None,
) -> None:
    """Fold an adapter into its model and write a plain checkpoint, for engines that take no adapters."""
    from mm_cb.models.merging import merge as write_merged

    merged = write_merged(model, adapter, out, dtype=dtype)
    files({"merged model": merged})
    evaluate: list[str | Path] = [
        "eval",
        "over-refusal",
        "--model",
        merged,
        "--data",
        "requests.jsonl",
        "--out",
        "runs/benign-merged",
    ]
    attack: list[str | Path] = [
        "attack",
        "--model",
        merged,
        "--base",
        model,
        "--behaviors",
        requests_for(model),
        "--out",
        "runs/attack-merged",
    ]
    what_next(
        Hint("what it keeps, as of any other model; requests.jsonl stands for your benign requests", evaluate),
        Hint("what it gives away; --base is for the attacks that know the breaker", [*attack, "--attack", "all"]),
    )
