"""``mm-cb doctor``."""

from typing import Annotated

import typer

EXAMPLE = "Example: mm-cb doctor --recipe llava-next-mistral-7b"


def doctor(
    recipe: Annotated[
        str | None, typer.Option(metavar="R", help="Also say what this recipe needs and what of it would fit here.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="A quick look at this model: its family, what is supported, what memory it takes here."
        ),
    ] = None,
) -> None:
    """Say what this machine can run: versions, extras, GPU, memory, disk, models and data sets that are here."""
    from mm_cb.doctor import print_findings

    if not print_findings(recipe, model):
        raise typer.Exit(2)
