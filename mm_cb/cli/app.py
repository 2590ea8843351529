"""The command line: parses, calls one package function, and turns every failure into an exit code and one honest line.

Exit codes: 0 done; 2 the user can fix it, one line on standard error; 1 our bug, traceback kept; 130 interrupted,
by SIGTERM 143, by SIGHUP 129.
Nothing heavy is imported before a command runs, so ``--help`` stays quick.
"""

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import typer

import mm_cb
from mm_cb.cli import attack, data, demo, doctor, evaluate, judge, merge, probe, report, score, train
from mm_cb.cli.groups import Command, Group
from mm_cb.cli.options import refuse_nowhere, refuse_unset
from mm_cb.core import closing
from mm_cb.core.errors import UserError, one_line

app = typer.Typer(
    name="mm-cb",
    cls=Group,
    help="Train multimodal circuit breakers, attack them with images, measure what they keep, report it on one page.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Example: mm-cb demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from mm_cb.core.provenance import git_revision

        revision = git_revision()
        typer.echo(f"mm-cb {mm_cb.__version__}" + (f" ({revision})" if revision else ""))
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version, and a checkout's revision."
        ),
    ] = False,
) -> None:
    pass


COMMANDS = (demo, train, probe, attack, judge, report, merge, doctor)
for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, cls=Command, epilog=_module.EXAMPLE)(getattr(_module, _name))
app.add_typer(data.app, name="data", epilog=data.EXAMPLE, cls=Group)
app.add_typer(evaluate.app, name="eval", epilog=evaluate.EXAMPLE, cls=evaluate.BenchmarkGroup)
app.add_typer(score.app, name="score", epilog=score.EXAMPLE, cls=score.StoredGroup)
for _name, (_function, _example) in attack.SUBCOMMANDS.items():
    app.command(_name, cls=Command, epilog=_example)(_function)


@cache
def _command() -> Any:
    """All commands, built once: a process may run many lines."""
    return typer.main.get_command(app)


def main() -> None:
    """Entry point of the ``mm-cb`` command."""
    from mm_cb.cli import failures, output, signals

    output.listen()
    signals.listen()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve other programs
    warnings.formatwarning = lambda message, *_, **__: f"mm-cb: note: {one_line(str(message))}\n"  # not a line of code
    warnings.showwarning = _once(warnings.showwarning)
    code = run(sys.argv[1:])
    if (error := output.lost()) is not None and code == failures.DONE:
        code = failures.unprinted(error)
    sys.exit(code)


def _once(show: Callable[..., None]) -> Callable[..., None]:
    """Show each note once: a dry run reads its rows for the samples and again for the start."""
    shown: set[str] = set()

    def show_new(message: Warning | str, *rest: Any, **more: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            show(message, *rest, **more)

    return show_new


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; messages go to standard error."""
    from mm_cb.cli import failures, signals

    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    closing.TYPED[:] = arguments
    try:
        if sys.flags.optimize > 1:
            raise UserError(
                "Python was started without docstrings (`-OO`, PYTHONOPTIMIZE=2), and transformers reads its own: "
                "start it without."
            )
        refuse_nowhere()
        command = _command()
        refuse_unset(arguments)
        code = command.main(args=arguments or ["--help"], prog_name="mm-cb", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = failures.INTERRUPTED
    except BaseException as e:
        if signals.received() is None and not failures.was_interrupted(e):
            return failures.explain(e, arguments)
        code = failures.INTERRUPTED  # behind which more failed: its terminal may be gone, an import half done
    if code == failures.INTERRUPTED:
        return failures.interrupted(arguments, signals.received())
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
