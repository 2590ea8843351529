"""The benchmarks by name. Imports nothing heavy, for ``--help`` and ``--list``."""

from __future__ import annotations

from mm_cb.benchmarks.base import Benchmark
from mm_cb.core.user_code import entry_of, is_ours, refuse_taken
from mm_cb.metrics.table import metric, register_metric, shipped

_BENCHMARKS: dict[str, Benchmark] = {}


def register_benchmark(new: Benchmark) -> None:
    """Make a benchmark and its metrics known; one of yours that has its name already is replaced.

    Raises:
        ValueError: If it brings no metric or one that nothing would fill, or lacks one of the lines that a list shows.
        UserError: If its name, or that of a metric, is one that comes with the package.
    """
    lacking = [key for key in ("name", "title", "about", "needs") if not getattr(new, key, "")]
    if lacking or not new.metrics:
        raise ValueError(f"a benchmark must have {', '.join(lacking) or 'at least one metric'}, got none.")
    if type(new).items is Benchmark.items and type(new).measure is Benchmark.measure:
        idle = [one.name for one in new.metrics[1:] if not (one.part_of or one.flag_of)]
        if idle:
            raise ValueError(
                f"the scores are those of the first metric, `{new.metrics[0].name}`; a further one must have `part_of` "
                f"or `flag_of`, `{idle[0]}` has neither. Rules for one metric: `score` may return a mapping."
            )
    if not is_ours(type(new)):
        refuse_taken(new.name, "benchmark", [name for name, held in _BENCHMARKS.items() if is_ours(type(held))])
        refused = [one.name for one in new.metrics if shipped(one.name) and one != metric(one.name)]
        if refused:
            refuse_taken(refused[0], "metric", refused)
    for one in new.metrics:
        register_metric(one)
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
