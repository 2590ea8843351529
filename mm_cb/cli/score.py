"""``mm-cb score``: stored outputs scored, without a model."""

import typer

from mm_cb.benchmarks.registry import benchmark_names, get_benchmark
from mm_cb.cli.benchmark_flags import score_command
from mm_cb.cli.groups import Command

EXAMPLE = "Example: mm-cb score mmmu --responses outputs --out runs/mmmu"

app = typer.Typer(help="Score outputs that are stored already, without a model.", rich_markup_mode=None)
for _name in benchmark_names():
    _benchmark = get_benchmark(_name)
    if _benchmark.stored is not None:
        _example = f"Example: mm-cb score {_name} {_benchmark.score_example} --out runs/{_name}"
        app.command(_name, epilog=_example, cls=Command)(score_command(_benchmark))
