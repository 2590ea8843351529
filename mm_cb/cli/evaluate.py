"""``mm-cb eval``: what a model can still do."""

from pathlib import Path
from typing import Annotated

import typer

from mm_cb.cli import evaluate_wild
from mm_cb.cli.options import Adapter, Device, Dtype, Out, Seed, System, read_system
from mm_cb.core.errors import UserError

app = typer.Typer(
    help="Measure what a model can still do: MMMU, LLaVA-Bench-in-the-Wild, over-refusal.", rich_markup_mode=None
)
EXAMPLE = "Example: mm-cb eval mmmu --model miniature --data my-copy --out runs/mmmu"


@app.command(epilog=EXAMPLE)
def mmmu(
    out: Out,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]",
            help="subjects=Art,Music; with a model also split, prompt (official, lmms_eval), pictures (named, first), "
            "max_new_tokens, limit, batch.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="Hub id, local directory, or `miniature`.")] = None,
    adapter: Adapter = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask the model of this name at an OpenAI-compatible address.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="D", help="Hub id, or a local copy: D/<Subject> of Parquet files or `save_to_disk`."),
    ] = None,
    responses: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Score stored outputs: DIR/<Subject>/output.json.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score parsed answers (JSON: id to answer), with --answers.")
    ] = None,
    answers: Annotated[Path | None, typer.Option(metavar="FILE", help="An official answer file.")] = None,
    subject: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its name in results.json.  [default: base, with --adapter rr]"),
    ] = None,
    seed: Seed = 0,
    system: System = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Score MMMU by the official rules: of a model, of stored outputs, or of parsed answers.

    Beside the official number stand the one without random letters, its interval, and every reason to doubt it.
    """
    if sum(source is not None for source in (model, responses, predictions)) != 1:
        raise UserError("give one of `--model`, `--responses`, `--predictions` (with `--answers`).")
    if (predictions is None) != (answers is None):
        raise UserError("`--predictions` and `--answers` belong together: give both or neither.")
    asking = {"--adapter": adapter, "--endpoint": endpoint, "--data": data, "--system": system}
    useless = [name for name, value in asking.items() if value is not None and model is None]
    if useless:
        raise UserError(f"`{useless[0]}` needs `--model`: stored answers are scored without one.")
    from mm_cb.benchmarks.mmmu import run
    from mm_cb.benchmarks.mmmu.settings import Settings, StoredSettings
    from mm_cb.core.settings import with_overrides
    from mm_cb.inference.source import Source, subject_name

    text = read_system(system)
    name = subject or subject_name(adapter, text)
    if model is not None:
        settings = with_overrides(Settings(), overrides or [])
        source = Source(model, adapter, device=device, dtype=dtype, endpoint=endpoint, system=text)
        run.run_model(source, settings, out, data=data, subject=name, seed=seed)
        return
    subjects = with_overrides(StoredSettings(), overrides or []).subjects
    if responses is not None:
        run.run_responses(responses, out, subjects=subjects, subject=name, seed=seed)
    elif predictions is not None and answers is not None:
        run.run_predictions(predictions, answers, out, subjects=subjects, subject=name, seed=seed)


app.command("llava-wild", epilog=evaluate_wild.LLAVA_WILD)(evaluate_wild.llava_wild)
app.command("over-refusal", epilog=evaluate_wild.OVER_REFUSAL)(evaluate_wild.over_refusal)
