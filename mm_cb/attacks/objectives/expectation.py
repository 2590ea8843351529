"""Expectation over transformations: a picture that still works after being moved, shrunk and compressed on its way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import Jpeg, Place, Rescale, eot
from image_attacks.transformations import Transformation
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.stochastic import StochasticTarget
from mm_cb.attacks.saved import to_pixels
from mm_cb.inference.subjects import Subject

_BEST_QUALITY = 95


class EotObjective(StochasticTarget):
    """Mean of the target's loss over random places of the patch, scales of the picture and qualities of JPEG.

    Files are held to the target's loss of the file as it is.

    Source:
        Expectation over transformation (Athalye et al. 2018, arXiv:1707.07397), in the setting of malicious image
        patches (Aichberger et al. 2025, arXiv:2503.10809): a patch on a screen that makes an agent call what the
        attacker wants. Deviations: transformations are drawn per step, one by default; a screenshot's own layout is
        the user's picture.
    """

    def _prepare(self, subject: Subject, pictures: Sequence[Image], config: AttackConfig) -> bool:
        self.samples, self.transformations = config.eot_samples, list[Transformation]()
        if config.threat.norm == "patch":
            clean = torch.stack([to_pixels(picture) for picture in pictures]).to(subject.model.device)
            self.transformations.append(Place(clean, (int(config.threat.size), int(config.threat.size))))
        if config.eot_scale < 1:
            self.transformations.append(Rescale(config.eot_scale, 1))
        if config.eot_quality:
            self.transformations.append(Jpeg(config.eot_quality, max(config.eot_quality, _BEST_QUALITY)))
        return bool(self.transformations)

    def _drawn(self, pixels: Tensor, random: torch.Generator) -> Tensor:
        return eot(self.target, self.transformations, samples=self.samples, generator=random)(pixels)
