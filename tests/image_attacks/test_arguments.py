"""What is no number, or neither true nor false, is refused by name wherever one is given."""

import re

import pytest
import torch

from image_attacks import (
    L2,
    Jpeg,
    Linf,
    Rescale,
    adam_pgd,
    apgd,
    eot,
    pgd,
    prefix_hinge,
    sign_noise,
)

PICTURES = torch.full((1, 3, 4, 4), 0.5)
NUMBERS = {
    "steps": lambda value: pgd(PICTURES.mean, PICTURES, threat_model=Linf(0.1), steps=value),
    "restarts": lambda value: apgd(PICTURES.mean, PICTURES, threat_model=Linf(0.1), restarts=value),
    "momentum": lambda value: pgd(PICTURES.mean, PICTURES, threat_model=Linf(0.1), momentum=value),
    "step_size": lambda value: pgd(PICTURES.mean, PICTURES, threat_model=Linf(0.1), step_size=value),
    "betas": lambda value: adam_pgd(PICTURES.mean, PICTURES, threat_model=Linf(0.1), betas=(0.9, value)),
    "epsilon": Linf,
    ".epsilon": L2,
    "..epsilon": lambda value: sign_noise(PICTURES, value),
    "probability": lambda value: prefix_hinge(torch.zeros(1, 2, 3), torch.tensor([[-100, 1]]), value),
    "Rescale.low": lambda value: Rescale(value),
    "Jpeg.high": lambda value: Jpeg(1, value),
    "samples": lambda value: eot(PICTURES.mean, [Jpeg()], samples=value, generator=torch.Generator()),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("no_number", [True, False, "1", None, [1]])
def test_what_is_no_number_is_refused_wherever_one_is_given(name, no_number):
    if not (no_number is None and name == "step_size"):
        with pytest.raises(
            (TypeError, ValueError), match=rf"{name.lstrip('.')}.* must be .*, got {re.escape(repr(no_number))} \("
        ):
            NUMBERS[name](no_number)


@pytest.mark.parametrize("start", ["no", 2, None])
def test_a_random_start_is_wanted_or_not(start):
    with pytest.raises(ValueError, match="`random_start` must be True or False, got"):
        pgd(PICTURES.mean, PICTURES, threat_model=Linf(0.1), random_start=start)
