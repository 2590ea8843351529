"""Pieces of work that survive a kill: each is computed once, written whole, and read back afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mm_cb.core.runs import write_json

T = TypeVar("T")


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON value in ``path``; computed and written in one step if it is not there yet.

    A piece is either complete under its name or absent, so the same command started again repeats nothing finished. The
    value passes through JSON both times: a resumed run sees exactly what an uninterrupted one sees.
    """
    if path.is_file():
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            pass  # written by no version of `write_json`; compute it again
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, compute())
    return json.loads(path.read_bytes())


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """Consecutive pieces of at most ``size`` items."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
