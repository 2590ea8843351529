"""A model in half precision is attacked in half precision: its gradient must still point where float32's does."""

import torch

from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.saved import to_pixels
from mm_cb.core.paths import data_path
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.pictures import open_picture
from mm_cb.inference.subjects import Subject
from mm_cb.models import load_model

AGREEMENT = 0.9
"""Least share of the pixels' values whose gradients have one sign in both; 0.98 and more was measured."""


def test_gradients_in_bfloat16_have_the_signs_of_those_in_float32():
    asked = [b for b in read_behaviors(data_path("miniature", "behaviors.jsonl")) if b.image][:4]
    pictures = [open_picture(behavior.image) for behavior in asked]
    gradients = []
    for dtype in ("float32", "bfloat16"):
        pixels = torch.stack([to_pixels(picture) for picture in pictures]).requires_grad_(True)
        losses = TargetObjective(Subject("base", load_model("miniature", dtype=dtype)), asked, pictures)(pixels)
        (gradient,) = torch.autograd.grad(losses.sum(), pixels)
        assert gradient.dtype == losses.dtype == torch.float32  # what is optimised, and its loss, whatever the model is
        gradients.append(gradient.flatten(1))
    float32, bfloat16 = gradients
    assert not torch.equal(float32, bfloat16)
    assert ((float32.sign() == bfloat16.sign()).float().mean(dim=1) >= AGREEMENT).all()
