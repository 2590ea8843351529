"""The demo's breaker, and what two requests without a picture are shown."""

from pathlib import Path

import pytest
import torch

from mm_cb.attacks.saved import to_pixels
from mm_cb.data.behaviors_file import grey_canvas
from mm_cb.inference.subjects import Subject
from mm_cb.miniature import NAME
from mm_cb.models import load_model

BREAKER = Path(__file__).resolve().parents[3] / "results" / "miniature_demo" / "rr"


@pytest.fixture(scope="session")
def breaker():
    return Subject("rr", load_model(NAME, adapter=BREAKER), adapted=True)


@pytest.fixture
def canvases(breaker):
    return [grey_canvas(breaker.model.canvas)] * 2


def pixels_of(pictures):
    return torch.stack([to_pixels(one) for one in pictures])
