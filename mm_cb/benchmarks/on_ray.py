"""Runs of benchmarks by the processes of Ray: the run of one process, its batches answered side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.base import Benchmark
from mm_cb.benchmarks.registry import get_benchmark
from mm_cb.benchmarks.runner import run_benchmark
from mm_cb.benchmarks.settings import Settings
from mm_cb.core.user_code import file_of
from mm_cb.core.workers import Workers, lead_on_ray
from mm_cb.inference.source import ModelSource
from mm_cb.inference.subjects import Subject, load_subject


def run_on_ray(
    count: str, benchmark: Benchmark, source: ModelSource, settings: Settings, out: Path, **more: Any
) -> None:
    """As `mm_cb.benchmarks.runner.run_benchmark`, by ``count`` processes; files and results are those of one."""
    called = str(file_of(type(benchmark)) or benchmark.name)
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    load = partial(load_subject, source, more["subject"])
    lead_on_ray(count, source.device, load, partial(_lead, called, source, given, out, more))


def _lead(
    called: str,
    source: ModelSource,
    settings: Mapping[str, Any],
    out: Path,
    more: Mapping[str, Any],
    workers: Workers[Subject],
) -> None:
    benchmark = get_benchmark(called)
    run_benchmark(benchmark, source, benchmark.settings(**settings), out, workers=workers, **more)
