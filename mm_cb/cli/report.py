"""``mm-cb report``."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from mm_cb.core.closing import Hint, again, files, say, what_next
from mm_cb.core.errors import UserError

EXAMPLE = "Example: mm-cb report runs/base-pgd runs/rr-pgd runs/base-mmmu runs/rr-mmmu --out report.html"


def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories; several are compared item by item.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page to write.  [default: report.html in RUN_DIR, of several runs here]"),
    ] = None,
    show_completions: Annotated[
        bool, typer.Option("--show-completions", help="Show completions judged harmful, or not judged, as well.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Make one self-contained HTML page from runs: base, safety prompt and circuit breaker paired by item.

    Its table and its verdict are printed as well.
    """
    from mm_cb.core.runs import read_run

    for run_dir in run_dirs:
        read_run(run_dir)
    target = out or (run_dirs[0] if len(run_dirs) == 1 else Path()) / "report.html"
    from mm_cb.report import judge_report, print_table, refuse_no_page, write_report
    from mm_cb.report.labels import conditions_called
    from mm_cb.report.text import clean_text

    if out is None and len(run_dirs) > 1 and Path("run.json").exists():
        raise UserError(
            "this folder is a run, whose page stays its own; give a file for the page of several as `--out`."
        )
    refuse_no_page(target, "--out")
    data = write_report(run_dirs, target, show_completions=show_completions)
    with conditions_called({name: text for run in data.runs for name, text in run.labels.items()}):
        print_table(data.measurements, strengths=data.strengths, pictured=not data.by_texts)
        verdict = judge_report(data)
    for hole in (hole for run in data.runs for hole in run.holes):
        say(clean_text(hole))
    typer.echo()
    for line in clean_text(verdict.told).split("\n"):
        say(line)
    typer.echo()
    say("The page is one file that needs no network; open it in a browser:")
    files({"page": target})
    if open_page:
        webbrowser.open(target.resolve().as_uri())
    elif words := again({}, ["--open"]):
        what_next(Hint("the same, and open it", words))
