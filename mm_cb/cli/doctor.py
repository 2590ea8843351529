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
    laws: Annotated[
        bool,
        typer.Option(
            "--laws", help="Load --model and ask whether it keeps what training and attacks rest on: a line a law."
        ),
    ] = False,
) -> None:
    """Say what this machine can run: versions, extras, GPU, memory, disk, models and data sets that are here."""
    from mm_cb.core.errors import UserError
    from mm_cb.doctor import print_findings, print_laws

    if laws and model is None:
        raise UserError("`--laws` asks a model: `mm-cb doctor --model M --laws`.")
    if model is not None and laws:
        print_laws(model)
        return
    if not print_findings(recipe, model):
        raise typer.Exit(2)
