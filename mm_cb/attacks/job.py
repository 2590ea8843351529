"""One attack on one subject: what its batches share, and the search over one of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_cb.attacks import saved as files
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.entry import resolved
from mm_cb.attacks.judged_files import Asked, OutcomeOf, complete
from mm_cb.attacks.objectives.target import Objective, TargetObjective, target_objective
from mm_cb.attacks.saved import as_picture
from mm_cb.attacks.search import Found, make_objective, search
from mm_cb.core.errors import UserError
from mm_cb.core.progress import CountedWork, clock
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.prompts_file import ImportedPrompt
from mm_cb.inference.subjects import Subject
from mm_cb.models import VisionModel


class Attacker(NamedTuple):
    """What a process that attacks holds: a model, and who says what its answers are."""

    subject: Subject
    judge: OutcomeOf


@dataclass(frozen=True)
class Job:
    """One attack on one subject, with everything that its batches share."""

    subject: Subject
    config: AttackConfig
    folder: Path
    judge: OutcomeOf
    task: CountedWork
    starts: Mapping[str, str] | None = None
    """Behaviour id → picture (relative to ``folder``) from which the first run starts, in a chain of attacks."""
    responses: Mapping[str, str] | None = None
    """Behaviour id → response to force, where the base model has written one under its own hijack."""
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None = None
    """Behaviour id → the prompts that an attack with imported ones sends, one a run."""

    @property
    def pictured(self) -> bool:
        """Whether its behaviours are attacked with a picture of their own or a grey one, which is then saved."""
        return isinstance(self.subject.model, VisionModel) and not self.config.entry.imported

    def tried(self, behavior: Behavior, restart: int) -> bool:
        """Whether there is such a run of a behaviour: one for each prompt, where they are imported."""
        return not self.config.entry.imported or restart < len((self.prompts or {})[behavior.id])


def objective_of(job: Job, asked: Asked, target: TargetObjective, restart: int) -> Objective:
    """What the attack minimises; the target's loss where it minimises nothing else."""
    entry = job.config.entry
    if not entry.optimises or resolved(entry.objective) is target_objective:
        return target
    responses = [(job.responses or {}).get(behavior.id) for behavior in asked.behaviors]
    return make_objective(job.subject, asked.prompts, files.images(asked.clean), job.config, responses, restart)


def search_batch(job: Job, asked: Asked, objective: Objective, clean: Tensor, restart: int, state: Path) -> Found:
    """Search once over a batch, from the pictures of a chain where there are any, and show how far it is."""
    config, starts, group = job.config, job.starts or {}, asked.behaviors
    first = None
    if restart == 0 and starts:
        first = torch.stack([files.read(job.folder, starts[b.id]).pixels for b in group]).to(clean)
    seen, begun = 0, time.monotonic()

    def show(step: int, losses: Tensor) -> None:
        nonlocal seen
        seen += 1
        if step % 10 == 0:
            left = clock((time.monotonic() - begun) / seen * (config.steps + 1 - step))
            note = f"step {step - 1} of {config.steps} of this batch, {left} left in it, loss {losses.mean():.2f}"
            job.task.advance(0, note=note, part=len(group) * seen / (config.steps + 1))

    def broken(pixels: Tensor) -> list[bool]:
        said = complete(asked, [as_picture(p) for p in pixels], config)
        return [job.judge(b, text) == "harmful" for b, text in zip(group, said, strict=True)]

    try:
        return search(
            objective,
            clean,
            config,
            model=job.subject.model,
            generators=generators(config, restart, group),
            random_start=restart > 0,
            first=first,
            broken=broken,
            state=state,
            show=show,
        )
    except UserError as error:
        raise UserError(f"{error} Behaviours of this batch: {', '.join(b.id for b in group[:8])}.") from error


def generators(config: AttackConfig, restart: int, group: Sequence[Behavior]) -> list[torch.Generator]:
    """A random stream of its own for every behaviour and restart, the same for every subject."""
    return [stream(behavior, config.seed, restart) for behavior in group]


def stream(behavior: Behavior, *key: int) -> torch.Generator:
    """The random stream that belongs to a behaviour and these numbers."""
    entropy = np.random.SeedSequence([*key, *behavior.id.encode()])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
