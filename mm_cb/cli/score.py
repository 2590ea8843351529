"""``mm-cb score``: stored outputs scored, without a model."""

import typer

from mm_cb.benchmarks.base import Benchmark
from mm_cb.benchmarks.registry import benchmark_names, get_benchmark
from mm_cb.cli.benchmark_flags import score_command
from mm_cb.cli.evaluate import BenchmarkGroup
from mm_cb.cli.groups import Command
from mm_cb.core.errors import UserError

EXAMPLE = "Example: mm-cb score mmmu --responses outputs --out runs/mmmu"


def _add(to: typer.Typer, benchmark: Benchmark, called: str = "") -> None:
    if benchmark.stored is None:
        raise UserError(f"stored outputs of `{benchmark.name}` cannot be scored, only a model's.")
    name = called or benchmark.name
    example = f"Example: mm-cb score {name} {benchmark.score_example} --out runs/{benchmark.name}"
    to.command(benchmark.name, epilog=example, cls=Command)(score_command(benchmark))


class StoredGroup(BenchmarkGroup):
    """Knows the benchmarks whose outputs can be scored, and those that a Python file registers."""

    add = staticmethod(_add)


app = typer.Typer(help="Score outputs that are stored already, without a model.", rich_markup_mode=None)
for _one in map(get_benchmark, benchmark_names()):
    if _one.stored is not None:
        _add(app, _one)
