"""How commands show their help: options under headings, commands with the whole of their first line."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

from mm_cb.core.errors import unknown

LAST = ("Run", "Options")
"""Headings that come behind all others: where a run goes and on what, and what every command has."""


class Command(TyperCommand):
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
        for heading in sorted(groups, key=lambda name: LAST.index(name) if name in LAST else -1):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


class Group(TyperGroup):
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
