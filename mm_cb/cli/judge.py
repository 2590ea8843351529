"""``mm-cb judge``."""

from pathlib import Path
from typing import Annotated

import typer

from mm_cb.cli.options import Device, Dtype, behaviors_file, given, number
from mm_cb.core.closing import here, listing, say
from mm_cb.core.errors import UserError
from mm_cb.core.paths import absolute
from mm_cb.judges.registry import JUDGED, JudgeEntry, judge_entry, judge_names, refuse_unread

EXAMPLE = "Example: mm-cb judge runs/attack --judge refusal-strings"


def _list(wanted: bool) -> None:
    if not wanted:
        return
    listing((name, entry.about, _needs(entry)) for name in judge_names() for entry in [judge_entry(name)])
    raise typer.Exit()


def _needs(entry: JudgeEntry) -> str:
    if entry.checkpoint:
        return f"{entry.checkpoint}, fetched once from the hub, and for speed a GPU"
    if "--endpoint" in entry.reads:
        return "--endpoint URL, --judge-model NAME, --prompt-file FILE, and the extra: pip install -e '.[judge]'"
    return "nothing: no model, no network"


def judge(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run with completions.")],
    judge: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(judge_names())}, or a Python file of yours.")
    ],
    judge_model: Annotated[
        str | None, typer.Option(metavar="M", help="Folder or hub id of the judge, or the name it is served under.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible address, for --judge endpoint.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The judge's prompt, instead of the one on its card.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ANSWER=OUTCOME",
            help="What an endpoint's answer means: harmful, refusal, other or not_judged; of benign requests refusal, "
            "partial_refusal or compliance.  [default: yes=harmful, no=other]",
        ),
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="Show the pictures to an endpoint's judge.")] = False,
    behaviors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The run's behaviours file, where a judge needs more of it.", callback=behaviors_file
        ),
    ] = None,
    batch: Annotated[int, number("batch", "Completions judged at a time.")] = 8,
    max_new_tokens: Annotated[int, number("max_new_tokens", "Longest answer of an endpoint's judge, in tokens.")] = 64,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Say of every judge what it is.")
    ] = False,
) -> None:
    """Judge a run's stored completions again; the model that wrote them is not needed.

    Verdicts are kept per judge in RUN_DIR/judgements, with the agreement of every two judges; items.jsonl and
    results.json carry the newest ones. A report page in RUN_DIR is made again; one elsewhere is for mm-cb report.
    """
    run_dir = absolute(run_dir)
    behaviors = None if behaviors is None else absolute(behaviors)
    entry = judge_entry(judge)
    refuse_unread(entry, given("--device", "--dtype", "--batch", "--max-new-tokens"))
    from mm_cb.cli.attacked import show_run
    from mm_cb.core.checked import read_records
    from mm_cb.core.pages import PAGE, not_ours
    from mm_cb.core.progress import Progress
    from mm_cb.core.records import Item
    from mm_cb.core.runs import read_run
    from mm_cb.judges.registry import JudgeOptions, open_judge
    from mm_cb.judges.rejudge import judgeable, rejudge
    from mm_cb.report.labels import judges_called

    read_run(run_dir)  # before a judge of many gigabytes is loaded
    if entry.checkpoint is not None:
        judgeable(read_records(run_dir / "items.jsonl", Item), run_dir, entry.name, JUDGED)
    options = JudgeOptions(
        name=entry.name,
        model=judge_model,
        endpoint=endpoint,
        prompt_file=prompt_file,
        labels=label or (),
        pictures=pictures,
        device=device,
        dtype=dtype,
        batch=batch,
        max_new_tokens=max_new_tokens,
    )
    opened = open_judge(options)
    page = run_dir / PAGE
    had_page = page.is_file() and not not_ours(page)
    with Progress() as progress:
        found = rejudge(run_dir, opened, behaviors=behaviors, progress=progress)
    for pair in (pair for pair in found if pair["n"]):
        first, second = judges_called(pair["judges"])
        kappa = "undefined" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        say(
            f"{first} and {second}: {pair['agreement']:.1f} % agreement, kappa {kappa} (n = {pair['n']}, "
            f"{len(pair['disagreements'])} disagreements)",
            "  ",
        )
    if had_page:
        from mm_cb.report import write_report

        write_report([run_dir], page)
        typer.echo(f"page made again: {here(page)}")
    typer.echo(f"every verdict: {here(run_dir / 'judgements')}\n")
    try:
        show_run(run_dir)
    except UserError as error:  # the verdicts are written, whatever else of the run cannot be read
        say(f"the run's table cannot be shown: {error}")
