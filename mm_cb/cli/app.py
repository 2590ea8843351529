"""The command line: parses, calls one package function, and turns every failure into an exit code and one honest line.

Exit codes: 0 done; 2 the user can fix it, one line on standard error; 1 our bug, traceback kept; 130 interrupted.
Nothing heavy is imported before a command runs, so ``--help`` stays quick.
"""

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import mm_cb
from mm_cb.cli import attack, data, demo, doctor, evaluate, judge, merge, report, train
from mm_cb.core.errors import one_line, unknown


class _Command(TyperCommand):
    """A command whose help puts options under headings: those of ``rich_help_panel``, in the order they first come."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The line behind "Usage:", without what is only taken to be answered."""
        shown = (p for p in self.get_params(ctx) if not getattr(p, "hidden", False))
        return [self.options_metavar or "", *(piece for p in shown for piece in p.get_usage_pieces(ctx))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of every heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _Group(TyperGroup):
    """Names the nearest command when one is mistyped, and lists commands with the whole of their first line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, ``attack verify`` behind ``attack``."""
        first = [name for name in self.commands if " " not in name]
        return sorted(self.commands, key=lambda name: (first.index(name.split()[0]), name))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with its first line, uncut."""
        rows = [(name, self.commands[name].get_short_help_str(limit=300)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Look a command up (``attack verify`` is one), or raise a UserError that lists the valid ones."""
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        if args and args[0] not in self.commands:
            raise unknown("command", args[0], [name for name in self.commands if " " not in name])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="mm-cb",
    cls=_Group,
    help="Train multimodal circuit breakers, attack them with images, measure what they keep, report it on one page.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


COMMANDS = (demo, train, attack, judge, report, merge, doctor)
for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, cls=_Command, epilog=_module.EXAMPLE)(getattr(_module, _name))
app.add_typer(data.app, name="data", epilog=data.EXAMPLE, cls=_Group)
app.add_typer(evaluate.app, name="eval", epilog=evaluate.EXAMPLE, cls=_Group)
for _name, (_function, _example) in attack.SUBCOMMANDS.items():
    app.command(_name, cls=_Command, epilog=_example)(_function)


def main() -> None:
    """Entry point of the ``mm-cb`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail
    warnings.formatwarning = lambda message, *_, **__: f"mm-cb: note: {one_line(str(message))}\n"  # not a line of code
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; messages go to standard error."""
    from mm_cb.cli import failures

    command: Any = typer.main.get_command(app)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
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
