"""``mm-cb score``: stored outputs scored, without a model."""

from typing import Any

import typer
import typer.main

from mm_cb.benchmarks.base import Benchmark
from mm_cb.benchmarks.registry import benchmark_names, get_benchmark
from mm_cb.cli.benchmark_flags import score_command
from mm_cb.cli.groups import Command, Group
from mm_cb.core.errors import UserError

EXAMPLE = "Example: mm-cb score mmmu --responses outputs --out runs/mmmu"


class StoredGroup(Group):
    """Knows the benchmarks whose outputs can be scored, and those that a Python file registers."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Look a benchmark up.

        Raises:
            UserError: If there is none of that name, or its outputs cannot be scored without a model.
        """
        if args and args[0] not in self.commands:
            benchmark = get_benchmark(args[0])
            if benchmark.stored is None:
                raise UserError(f"stored outputs of `{benchmark.name}` cannot be scored, only a model's.")
            single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            _add(single, benchmark, args[0])
            return args[0], typer.main.get_command(single), args[1:]
        return super().resolve_command(ctx, args)


def _add(to: typer.Typer, benchmark: Benchmark, called: str = "") -> None:
    name = called or benchmark.name
    example = f"Example: mm-cb score {name} {benchmark.score_example} --out runs/{benchmark.name}"
    to.command(benchmark.name, epilog=example, cls=Command)(score_command(benchmark))


app = typer.Typer(help="Score outputs that are stored already, without a model.", rich_markup_mode=None)
for _one in map(get_benchmark, benchmark_names()):
    if _one.stored is not None:
        _add(app, _one)
