"""The benchmarks by name. Imports nothing heavy, for ``--help`` and ``--list``."""

from __future__ import annotations

from mm_cb.benchmarks.base import Benchmark
from mm_cb.core.user_code import entry_of
from mm_cb.metrics.table import register_metric

_BENCHMARKS: dict[str, Benchmark] = {}


def register_benchmark(new: Benchmark) -> None:
    """Make a benchmark and its metrics known; what has the same name is replaced.

    Raises:
        ValueError: If it brings no metric or one that nothing would fill, or lacks one of the lines that a list shows.
    """
    lacking = [key for key in ("name", "title", "about", "needs") if not getattr(new, key, "")]
    if lacking or not new.metrics:
        raise ValueError(f"a benchmark must have {', '.join(lacking) or 'at least one metric'}, got none.")
    if type(new).items is Benchmark.items and type(new).measure is Benchmark.measure:
        idle = [metric.name for metric in new.metrics[1:] if not (metric.part_of or metric.flag_of)]
        if idle:
            raise ValueError(
                f"the scores are those of the first metric, `{new.metrics[0].name}`; a further one must have `part_of` "
                f"or `flag_of`, `{idle[0]}` has neither. Rules for one metric: `score` may return a mapping."
            )
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
    return entry_of(name, "benchmark", _BENCHMARKS)
