"""The command line: parses, calls one package function, and turns every failure into an exit code and one honest line.

Exit codes: 0 done; 2 the user can fix it, one line on standard error; 1 our bug, traceback kept; 130 interrupted.
Nothing heavy is imported before a command runs, so ``--help`` stays quick.
"""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mm_cb
from mm_cb.errors import UserError, unknown

_EPSILON_GRID = 255
_ATTACKS = ("pgd", "pgd_adaptive", "noise", "no_attack")


class _Group(TyperGroup):
    """Names the nearest command when one is mistyped."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Look a command up, or raise a UserError that lists the valid ones."""
        if args and args[0] not in self.commands:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="mm-cb",
    cls=_Group,
    help="Train multimodal circuit breakers, attack them with images, measure what they keep, report it on one page.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option(metavar="DIR", help="Run directory; an existing one is gone on with.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything random in this run.", min=0)]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mm-cb {mm_cb.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: mm-cb demo --out my-demo")
def demo(
    out: Out = Path("mm-cb-demo"),
    full: Annotated[bool, typer.Option("--full", help="All behaviours, more steps, three restarts.")] = False,
    seed: Seed = 0,
    rr_seeds: Annotated[
        int, typer.Option(metavar="N", help="Circuit breakers to train, each from its own seed.", min=1, max=9)
    ] = 1,
) -> None:
    """Run the whole experiment on the packaged miniature: train, attack, measure, report.

    Needs no network, no GPU and no account. Interrupted, the same command goes on where it was.
    """
    from mm_cb.demo import run_demo

    run_demo(out, full=full, seed=seed, rr_seeds=rr_seeds)


@app.command(epilog="Example: mm-cb train miniature --out runs/rr training.max_steps=60")
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Recipe fields to change, by dotted name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/RECIPE]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what would be trained; load no weights.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Short for seed=N.", min=0)] = None,
    device: Annotated[str | None, typer.Option(metavar="D", help="Short for device=D: cpu, cuda, cuda:1.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="Short for dtype=T: float32, bfloat16.")] = None,
) -> None:
    """Train a circuit breaker (a LoRA adapter) from a recipe."""
    from mm_cb import commands

    if list_:
        commands.list_recipes()
        return
    if recipe is None:
        raise UserError("`RECIPE` is missing: give a shipped name (see `mm-cb train --list`) or a YAML file.")
    short = [
        f"{key}={value}" for key, value in (("seed", seed), ("device", device), ("dtype", dtype)) if value is not None
    ]
    if dry_run:
        commands.show_plan(recipe, [*(overrides or []), *short])
    else:
        commands.train_recipe(recipe, [*(overrides or []), *short], out)


@app.command(
    epilog="Example: mm-cb attack --model miniature --adapter runs/rr --behaviors behaviors.jsonl --out runs/attack"
)
def attack(
    model: Annotated[str, typer.Option(metavar="M", help="Hub id, local directory, or `miniature`.")],
    behaviors: Annotated[Path, typer.Option(metavar="FILE", help="Behaviours file (JSONL).")],
    out: Out,
    adapter: Annotated[str | None, typer.Option(metavar="A", help="Directory of a PEFT adapter.")] = None,
    attack: Annotated[str, typer.Option(metavar="NAME", help=f"One of: {', '.join(_ATTACKS)}.")] = "pgd",
    epsilon: Annotated[str, typer.Option(metavar="N/255", help="Largest change of a pixel.")] = "32/255",
    steps: Annotated[int, typer.Option(metavar="N", help="Attack steps.", min=1)] = 1000,
    restarts: Annotated[int, typer.Option(metavar="N", help="Runs per behaviour; the worst one counts.", min=1)] = 1,
    seed: Seed = 0,
) -> None:
    """Attack a model's image input and judge it from the saved image files."""
    if attack not in _ATTACKS:
        raise unknown("attack", attack, _ATTACKS)
    numerator = parse_epsilon(epsilon)
    from mm_cb.evaluation.attack_run import run_attack

    run_attack(
        model=model,
        adapter=adapter,
        behaviors=behaviors,
        out=out,
        attack=attack,
        epsilon=numerator,
        steps=steps,
        restarts=restarts,
        seed=seed,
    )


@app.command(epilog="Example: mm-cb report mm-cb-demo --out report.html")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page to write.  [default: RUN_DIR/report.html]")
    ] = None,
) -> None:
    """Make one self-contained HTML page from a run directory."""
    from mm_cb.runs import read_run

    read_run(run_dir)
    target = out if out is not None else run_dir / "report.html"
    if target.is_dir():
        raise UserError(f"`--out` must be a file such as `{target / 'report.html'}`, got a directory.")
    from mm_cb.report import write_report

    write_report(run_dir, target)
    typer.echo(str(target))


@app.command(epilog="Example: mm-cb doctor")
def doctor() -> None:
    """Say what this machine can run: versions, image backend, GPU, memory, disk, the packaged miniature."""
    from mm_cb.doctor import print_findings

    if not print_findings():
        raise typer.Exit(2)


def parse_epsilon(text: str) -> int:
    """The numerator of an image budget over 255: ``"32/255"`` -> 32; decimals only where they lie on that grid.

    Raises:
        UserError: If the text is no number, lies outside 0..1 or between two grid points.
    """
    number, slash, denominator = text.partition("/")
    try:
        value = float(number) * (1 if slash else _EPSILON_GRID)
        on_grid = abs(value - round(value)) < 1e-3 and 0 <= round(value) <= _EPSILON_GRID
    except (ValueError, OverflowError):
        value, on_grid = 0.0, False
    if not on_grid or (slash and denominator.strip() != "255"):
        raise UserError(
            f"`--epsilon` must be n/255 with n in 0..255 (saved images have 8 bits), such as 32/255; got `{text}`."
        )
    return round(value)


def main() -> None:
    """Entry point of the ``mm-cb`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; messages go to standard error."""
    from mm_cb import failures

    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=arguments or ["--help"], prog_name="mm-cb", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as e:  # a reader that went away (`| head`)
        return e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        return failures.explain(e, arguments)
    if code == 130:
        return failures.interrupted()
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
