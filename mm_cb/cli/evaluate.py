"""``mm-cb eval``: what a model can still do."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.main

from mm_cb.benchmarks.base import Benchmark
from mm_cb.benchmarks.registry import benchmark_names, get_benchmark
from mm_cb.cli.benchmark_flags import eval_command
from mm_cb.cli.groups import Command, Group
from mm_cb.core.closing import listing

EXAMPLE = "Example: mm-cb eval over-refusal --model miniature --data data/examples/benign.jsonl --out runs/benign"


def _add(to: typer.Typer, benchmark: Benchmark, called: str = "") -> None:
    name = called or benchmark.name
    example = f"Example: mm-cb eval {name} --model miniature {benchmark.example} --out runs/{benchmark.name}"
    to.command(benchmark.name, epilog=example, cls=Command)(eval_command(benchmark))


class BenchmarkGroup(Group):
    """Knows the registered benchmarks, and those that a Python file registers."""

    add: Callable[[typer.Typer, Benchmark, str], None] = staticmethod(_add)
    """Puts the command of a benchmark into an application, under the name that it was called by."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Look a benchmark up.

        Raises:
            UserError: If there is none of that name (the nearest one is named), or it has no such command.
        """
        if args and args[0] not in self.commands:
            single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            self.add(single, get_benchmark(args[0]), args[0])
            return args[0], typer.main.get_command(single), args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(help=f"Measure what a model can still do: {', '.join(benchmark_names())}.", rich_markup_mode=None)
for _name in benchmark_names():
    _add(app, get_benchmark(_name))


def _list(wanted: bool) -> None:
    if not wanted:
        return
    listing((name, one.about, one.needs) for name in benchmark_names() for one in [get_benchmark(name)])
    raise typer.Exit()


@app.callback()
def _root(
    listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Say of every benchmark what it is and needs.")
    ] = False,
) -> None:
    pass
