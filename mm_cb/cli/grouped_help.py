"""Plain ``--help`` with the options in groups, nothing cut off."""

from typing import Any

from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command that shows its options under the headings that they name as ``rich_help_panel``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write every group in the order in which it first comes."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without the arguments that are taken only to be answered."""
        return [piece for piece in super().collect_usage_pieces(ctx) if piece.strip("[].")]
