"""Attack runs by the processes of Ray: the run of one process, its batches attacked side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.job import Attacker
from mm_cb.attacks.registry import attack_entries
from mm_cb.attacks.run import attacker, run_attack
from mm_cb.core.workers import Workers, lead_on_ray
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.inference.source import ModelSource


def attack_on_ray(
    count: str, source: ModelSource, behaviors: Path, out: Path, names: Sequence[str], config: AttackConfig, given: str
) -> None:
    """As `mm_cb.attacks.run.run_attack`, by ``count`` processes; files and results are those of one.

    ``given`` is what ``--attack`` named: Python files in it are run in every process.
    """
    read_behaviors(behaviors)  # what is wrong in it is said before Ray is started
    load = partial(_load, source, config.image_backend, given)
    lead_on_ray(count, source.device, load, partial(_lead, source, behaviors, out, names, config, given))


def _load(source: ModelSource, image_backend: str, given: str) -> Attacker:
    _register(given)
    return attacker(source, image_backend)


def _lead(
    source: ModelSource,
    behaviors: Path,
    out: Path,
    names: Sequence[str],
    config: AttackConfig,
    given: str,
    workers: Workers[Attacker],
) -> None:
    _register(given)
    run_attack(source, behaviors, out, names, config, workers=workers)


def _register(given: str) -> None:
    if given != "all":
        attack_entries(given)
