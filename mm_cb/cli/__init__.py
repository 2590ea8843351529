"""The command line: one module a command."""

from mm_cb.cli.app import main, run

__all__ = ["main", "run"]
