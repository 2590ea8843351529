"""The battery's view of a vision-language model: what it attacks, and where the judged pictures lie."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import load_png, save_png
from mm_cb.attacks.judged_files import to_pixels
from mm_cb.attacks.objectives.target import TargetObjective, encode
from mm_cb.attacks.registry import Attack
from mm_cb.attacks.runner import as_picture
from mm_cb.attacks.sanity.checks import ADAPTIVE
from mm_cb.attacks.sanity.measure import Bed
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

    def emitted(pixels: Tensor) -> list[bool]:
        inputs = encode(subject, group, [as_picture(p) for p in pixels], None)
        with subject.active() as model:
            said = model.generate(inputs, longest + 2)
        return [starts_with(text, behavior.target) for text, behavior in zip(said, group, strict=True)]

    def filed(pixels: Tensor) -> Tensor:
        saved = encode(subject, group, [as_picture(p) for p in pixels], None)
        assert saved.pixel_values is not None
        return objective.loss(saved.pixel_values)

    def keep(arm: str, pixels: Tensor) -> tuple[list[str], Tensor]:
        names = [f"images/{subject.name}/{arm.replace(' ', '-')}/{safe_id(behavior.id)}.png" for behavior in group]
        for name, one in zip(names, pixels, strict=True):
            with file_errors(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                save_png(one, folder / name)
        return names, torch.stack([load_png(folder / name) for name in names]).to(pixels)

    clean = torch.stack([to_pixels(picture) for picture in pictures]).to(subject.model.device)
    behind = "" if subject.system is None else f" behind the operator's of {len(subject.system)} characters"
    about = (
        f"white box; goal: the answer begins with a given text; pixels of the uploaded file of {pictures[0].width} x "
        f"{pictures[0].height} change, the user picks the text{behind}; "
        f"{type(subject.model.processor.image_processor).__name__}, {subject.model.base.dtype}; {len(group)} behaviours"
    )
    adaptive = {name: make_objective(subject, group, pictures, Attack(name)) for name in ADAPTIVE if subject.adapted}
    return Bed(subject.name, objective, smooth, emitted, clean, filed, about, adaptive, dtype_of(subject.model), keep)
