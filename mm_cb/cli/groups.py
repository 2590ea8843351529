"""How commands show their help: options under headings, commands with the whole of their first line."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from mm_cb.core.closing import shell, wrapped
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.places import refuse_inside_weights
from mm_cb.core.workers import AUTO

LAST = ("Run", "Options")
"""Headings that come behind all others: where a run goes and on what, and what every command has."""
_WEIGHTS = ("model", "adapter", "base", "probe", "judge_model")
"""Parameters that may name a folder of weights."""
_KIND = re.compile(r" <[^>]*>$")
"""The parser's word for what an argument is: a Python type."""
_BRACES = re.compile(r"^\{(\S+?)(?:\.\.\.)?\}(\.\.\.)?$|^\{(.*)\}(?:\.\.\.)?$")
"""An argument in the line of usage, as newer versions of the parser put it."""


class _Whole:
    """The parser's formatter, which breaks lines between words alone: no flag or name is cut at its hyphens."""

    width: int
    current_indent: int
    write: Callable[[str], None]

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        indent = " " * self.current_indent
        paragraphs = ("\n".join(wrapped(part, self.width, indent, indent)) for part in text.split("\n\n"))
        self.write("\n\n".join(paragraphs) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names and, beside them, what each is."""
        left = max((len(name) for name, _ in rows), default=0)
        indent, behind = " " * self.current_indent, " " * (self.current_indent + left + col_spacing)
        for name, about in rows:
            head = f"{indent}{name:{left + col_spacing}}"
            self.write("\n".join(wrapped(about, self.width, head, behind)).rstrip() + "\n")


class _Helpful:
    """A command's help: at the terminal's width, words whole, the example as a shell takes it."""

    epilog: str | None

    def get_help(self, ctx: Any) -> str:
        """All of it."""
        ctx.formatter_class = type("Whole", (_Whole, ctx.formatter_class), {})
        return str(super().get_help(ctx))  # type: ignore[misc]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example."""
        if self.epilog:
            begin = "Example: "
            formatter.write(f"\n{shell(self.epilog.removeprefix(begin), '  ', f'  {begin}')}\n")


class Command(_Helpful, TyperCommand):
    """A command whose help puts options under headings: those of ``rich_help_panel``, in the order they first come."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind a command; an option with one value may stand there once.

        Raises:
            UserError: If one is given twice: the parser would take the last.
        """
        args = _with_values(args)
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            option: Any
            for option, times in Counter(order).items():
                if times > 1 and not (option.multiple or option.count or option.is_flag):
                    raise UserError(
                        f"`{option.opts[0]}` takes one value and is given {times} times: leave one of them."
                    )
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command, unless it would write inside the weights that it reads."""
        out = ctx.params.get("out")
        if isinstance(out, Path):
            refuse_inside_weights(out, [ctx.params[name] for name in _WEIGHTS if ctx.params.get(name) is not None])
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The line behind "Usage:", without what is only taken to be answered."""
        shown = (p for p in self.get_params(ctx) if not getattr(p, "hidden", False))
        pieces = (piece for p in shown for piece in p.get_usage_pieces(ctx))
        return [self.options_metavar or "", *(_BRACES.sub(r"\1\2\3", piece) for piece in pieces)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of every heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                record = _KIND.sub("", record[0]), record[1]
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        last = LAST if len(groups.get("Options", ())) == 1 else LAST[:1]  # with no more than --help, behind all others
        for heading in sorted(groups, key=lambda name: last.index(name) if name in last else -(name == "Options") - 1):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])
        if below := _below(ctx):
            with formatter.section("Commands below it, each with a help of its own"):
                formatter.write_dl(below)


def _with_values(args: Sequence[str]) -> list[str]:
    """A command line in which every option has its value, also one that may stand without."""
    whole: list[str] = []
    for word, behind in itertools.pairwise([*args, "-"]):
        whole += [word, AUTO] if word == "--ray" and behind.startswith("-") else [word]
    return whole


def _below(ctx: Any) -> list[tuple[str, str]]:
    """The commands that stand under a command, with their first lines: ``attack verify`` under ``attack``."""
    around = getattr(ctx.parent, "command", None)
    known = getattr(around, "commands", {})
    return [(name, known[name].get_short_help_str(limit=300)) for name in known if name.startswith(f"{ctx.info_name} ")]


class Group(_Helpful, TyperGroup):
    """Names the nearest command when one is mistyped, and lists commands with the whole of their first line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, ``attack verify`` behind ``attack``."""
        first = [name for name in self.commands if " " not in name]
        return sorted(self.commands, key=lambda name: (first.index(name.split()[0]), name))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with its first line, uncut."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.commands[name]
            rows.append((name, command.get_short_help_str(limit=300)))
            if type(command) is Group:  # not the benchmarks, which say themselves what they need
                below = command.list_commands(ctx)
                rows += [(f"{name} {one}", command.commands[one].get_short_help_str(limit=300)) for one in below]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Look a command up (``attack verify`` is one), or raise a UserError that lists the valid ones."""
        below = [name for name in self.commands if args and name.startswith(f"{args[0]} ")]
        if below and args[1:] and args[1][:1] != "-" and "=" not in args[1]:
            if " ".join(args[:2]) not in below:
                raise unknown("command", " ".join(args[:2]), below)
            args = [" ".join(args[:2]), *args[2:]]
        if args and args[0] not in self.commands:
            raise unknown("command", args[0], [name for name in self.commands if " " not in name])
        return super().resolve_command(ctx, args)
