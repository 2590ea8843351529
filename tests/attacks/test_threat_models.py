import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from image_attacks import Linf

levels = hnp.arrays("uint8", (2, 3, 3, 4))
moves = hnp.arrays("float32", (2, 3, 3, 4), elements=st.floats(-2, 2, width=32))


@settings(deadline=None)
@given(levels, moves, st.integers(0, 255))
def test_projection_lands_in_the_ball_and_in_the_box_and_is_idempotent(clean, move, epsilon):
    clean, ball = torch.from_numpy(clean) / 255, Linf(epsilon / 255)
    projected = ball.project(clean + torch.from_numpy(move), clean)
    assert (projected - clean).abs().max() <= epsilon / 255 + 1e-6
    assert projected.min() >= 0 and projected.max() <= 1
    assert torch.equal(ball.project(projected, clean), projected)


@settings(deadline=None)
@given(levels, moves, st.integers(0, 255))
def test_projection_is_the_nearest_allowed_point(clean, move, epsilon):
    clean, ball = torch.from_numpy(clean) / 255, Linf(epsilon / 255)
    pixels = clean + torch.from_numpy(move)
    inside = ball.project(torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)), clean)
    assert ((pixels - ball.project(pixels, clean)).abs() <= (pixels - inside).abs() + 1e-6).all()


def test_random_start_fills_the_ball_and_stays_in_the_box(generator):
    clean = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 50, 50)
    start = Linf(0.1).random_start(clean, generator)
    assert ((start - clean).abs() <= 0.1 + 1e-6).all() and start.min() >= 0 and start.max() <= 1
    middle = (start - clean)[1]
    assert middle.min() < -0.09 and middle.max() > 0.09 and middle.mean().abs() < 0.01


def test_epsilon_zero_is_a_point(generator):
    clean = torch.rand(2, 3, 4, 4, generator=generator)
    assert torch.equal(Linf(0).random_start(clean, generator), clean)


@pytest.mark.parametrize("epsilon", [-0.1, 8, float("nan"), float("inf")])
def test_epsilon_outside_the_unit_interval_is_refused(epsilon):
    with pytest.raises(ValueError, match="must lie in \\[0, 1\\].*8 / 255"):
        Linf(epsilon)
