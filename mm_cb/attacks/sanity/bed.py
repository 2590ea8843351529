"""The battery's view of a vision-language model: what it attacks, and where the judged pictures lie."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks import saved as files
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.target import TargetObjective, encode
from mm_cb.attacks.sanity.measure import ADAPTIVE, Bed, Filed
from mm_cb.attacks.saved import to_pixels
from mm_cb.attacks.search import make_objective
from mm_cb.core.files import file_errors
from mm_cb.core.paths import safe_id
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.metrics.observations import starts_with


def make_bed(subject: Subject, group: Sequence[Behavior], pictures: Sequence[Image], folder: Path) -> Bed:
    """Target losses through the deployed path and greedy answers, of files that lie in ``folder/images``."""
    objective = TargetObjective(subject, group, pictures)
    smooth = copy.copy(objective)  # the attack's own pass, so that S8 checks the gradient that is followed
    smooth.preprocess = getattr(objective.preprocess, "surrogate", objective.preprocess)
    longest = int(objective.inputs.completion_mask.sum(dim=1).max())

    clean = torch.stack([to_pixels(picture) for picture in pictures]).to(subject.model.device)

    def judge(arm: str, pixels: Tensor) -> Filed:
        names = [f"images/{subject.name}/{arm.replace(' ', '-')}/{safe_id(behavior.id)}.png" for behavior in group]
        with file_errors(folder / names[0]):
            saved = [files.save(folder, name, one) for name, one in zip(names, pixels, strict=True)]
        inputs = encode(subject, group, files.images(saved), None)
        assert inputs.pixel_values is not None
        losses = objective.loss(inputs.pixel_values)
        with subject.active() as model:
            said = model.generate(inputs, longest + 2)
        emitted = [starts_with(text, behavior.target) for text, behavior in zip(said, group, strict=True)]
        moved = (torch.stack([one.pixels for one in saved]) - clean.cpu()) * 255
        distances = moved.round().abs().flatten(1).amax(dim=1).int()
        return Filed(names, losses.cpu(), torch.tensor(emitted), distances)

    behind = "" if subject.system is None else f" behind the operator's of {len(subject.system)} characters"
    about = (
        f"white box; goal: the answer begins with a given text; pixels of the uploaded file of {pictures[0].width} x "
        f"{pictures[0].height} change, the user picks the text{behind}; "
        f"{type(subject.model.processor.image_processor).__name__}, {subject.model.base.dtype}; {len(group)} behaviours"
    )
    adaptive = {
        name: make_objective(subject, group, pictures, AttackConfig(name)) for name in ADAPTIVE if subject.adapted
    }
    return Bed(objective, smooth, clean, judge, about, adaptive, dtype_of(subject.model))
