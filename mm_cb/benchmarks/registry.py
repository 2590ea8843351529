"""The benchmarks by name. Imports nothing heavy, for ``--help`` and ``--list``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mm_cb.benchmarks.base import Benchmark
from mm_cb.core.errors import UserError, one_line, unknown
from mm_cb.metrics.table import register_metric

_BENCHMARKS: dict[str, Benchmark] = {}


def register_benchmark(new: Benchmark) -> None:
    """Make a benchmark and its metrics known; what has the same name is replaced.

    Raises:
        ValueError: If it brings no metric, or lacks one of the lines that a list shows.
    """
    lacking = [key for key in ("name", "title", "about", "needs") if not getattr(new, key, "")]
    if lacking or not new.metrics:
        raise ValueError(f"a benchmark must have {', '.join(lacking) or 'at least one metric'}, got none.")
    for metric in new.metrics:
        register_metric(metric)
    _BENCHMARKS[new.name] = new


def benchmark_names() -> list[str]:
    """All names, in the order of registration."""
    return list(_BENCHMARKS)


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of a name, or of a Python file that registers one.

    Raises:
        UserError: If there is none; names the nearest one.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in _BENCHMARKS:
        raise unknown("benchmark", name, _BENCHMARKS)
    return _BENCHMARKS[name]


def _from_file(path: Path) -> Benchmark:
    """Run a user's file, whose last registered benchmark is meant."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"`{path}` must be a Python file that registers a benchmark, it does not exist.")
    before = dict(_BENCHMARKS)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as e:  # whatever the user's file raises
        raise UserError(f"`{path}` cannot be imported: {type(e).__name__}: {one_line(str(e))}") from e
    new = [one for name, one in _BENCHMARKS.items() if before.get(name) is not one]
    if not new:
        raise UserError(f"`{path}` must call `register_benchmark`, it registers none.")
    return new[-1]
