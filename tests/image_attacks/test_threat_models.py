import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from image_attacks import L2, FileL2, Linf, Patch, Unconstrained, adam_pgd, apgd, pgd, random_search

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


def changed_levels(pixels, clean):
    return ((255 * pixels).round() - (255 * clean).round()).flatten(1).norm(dim=1)


@settings(deadline=None)
@given(levels, moves, st.floats(0, 6))
def test_a_file_of_the_file_ball_is_in_the_ball_and_no_file_further_along_the_way_is(clean, move, epsilon):
    clean, ball = torch.from_numpy(clean) / 255, FileL2(epsilon)
    pixels = clean + torch.from_numpy(move)
    projected = ball.project(pixels, clean)
    assert (changed_levels(projected, clean) <= 255 * epsilon + 1e-3).all()
    assert projected.min() >= 0 and projected.max() <= 1
    assert changed_levels(ball.project(projected, clean), projected).max() == 0
    for i, image in enumerate(pixels):
        if torch.equal(projected[i], image.clamp(0, 1)):
            continue
        scales = torch.linspace(0, 1, 2001).view(-1, 1, 1, 1)
        way = (clean[i] + scales * (image - clean[i])).clamp(0, 1)
        longest = changed_levels(way, clean[i].expand_as(way))
        tied = ((255 * way) % 1 - 0.5).abs().flatten(1).amin(dim=1) < 1e-3  # whose rounding the last bit decides
        within = longest[(longest <= 255 * epsilon) & ~tied]
        assert changed_levels(projected[i : i + 1], clean[i : i + 1]) >= within.max() - 1e-3


def test_the_plain_l2_ball_is_left_by_rounding_and_the_file_ball_is_filled(generator):
    clean = torch.full((1, 3, 40, 40), 128 / 255)
    gradient = torch.randn(clean.shape, generator=generator)
    files = {}
    for ball in (L2(0.3), FileL2(0.3)):
        projected = ball.project(clean + 5 * gradient, clean)
        files[type(ball)] = float(changed_levels(projected, clean)) / 255
    assert files[L2] > 0.3 + 1e-3
    assert 0.29 < files[FileL2] <= 0.3


@settings(deadline=None)
@given(levels, moves, st.floats(0, 6))
def test_l2_projection_lands_in_ball_and_box_and_no_allowed_point_is_nearer(clean, move, epsilon):
    clean, ball = torch.from_numpy(clean) / 255, L2(epsilon)
    pixels = clean + torch.from_numpy(move)
    projected = ball.project(pixels, clean)
    assert ((projected - clean).flatten(1).norm(dim=1) <= epsilon + 1e-5).all()
    assert projected.min() >= 0 and projected.max() <= 1
    torch.testing.assert_close(ball.project(projected, clean), projected, atol=1e-5, rtol=0)
    # The set is convex: a point is the nearest one if and only if no allowed point lies on the far side of it.
    others = ball.random_start(clean, torch.Generator().manual_seed(0)), clean, ball.project(1 - clean, clean)
    for other in others:
        assert (((pixels - projected) * (other - projected)).flatten(1).sum(1) <= 2e-3).all()


def test_l2_projection_is_not_ball_then_box():
    """Where the box cuts a part of the move off, the rest of the budget goes to the other values."""
    clean, pixels = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2), torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(L2(0.3).project(pixels, clean).flatten(), torch.tensor([0.0, 0.8]))


def test_l2_starts_are_uniform_in_the_ball(generator):
    """The share of starts within a fraction of the radius is that fraction to the power of the dimension."""
    clean = torch.full((4000, 1, 1, 3), 0.5)
    radii = (L2(0.4).random_start(clean, generator) - clean).flatten(1).norm(dim=1)
    for fraction in (0.5, 0.8, 0.9):
        assert (radii <= 0.4 * fraction).float().mean().item() == pytest.approx(fraction**3, abs=0.03)


def test_l2_start_lies_in_ball_and_box_and_its_step_has_norm_one(generator):
    clean = torch.rand(50, 3, 4, 4, generator=generator)
    start = L2(0.7).random_start(clean, generator)
    radius = (start - clean).flatten(1).norm(dim=1)
    assert (radius <= 0.7 + 1e-5).all() and radius.max() > 0.5 and start.min() >= 0 and start.max() <= 1
    gradient = torch.randn(2, 3, 4, 4, generator=generator)
    gradient[1] = 0
    step = L2(0.7).descent_direction(gradient)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.tensor([1.0, 0.0]))
    assert (step * gradient).sum() < 0


@pytest.mark.parametrize(
    ("attack", "within"),
    [
        *itertools.product([pgd, apgd, adam_pgd, random_search], [Linf(0.1), Unconstrained(), Unconstrained(0.5)]),
        *itertools.product([pgd, apgd, random_search], [L2(0.5)]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_patch_or_border_changes_nothing_outside_itself(within, attack, generator):
    images = torch.randint(0, 256, (2, 3, 6, 8), generator=generator) / 255
    weights = torch.randn(3, 6, 8, generator=generator)
    for patch in (Patch.rectangle((6, 8), (1, 2), (3, 4), within), Patch.border((6, 8), 1, within)):
        result = attack(
            lambda pixels: torch.sin(9 * pixels * weights).flatten(1).sum(1),
            images,
            threat_model=patch,
            steps=6,
            restarts=2,
        )
        for found in result.per_restart.images:
            assert torch.equal(found[..., ~patch.mask], images[..., ~patch.mask])
            torch.testing.assert_close(within.project(found, images), found, atol=1e-5, rtol=0)
        assert not torch.equal(result.images, images)


def test_projection_puts_the_clean_pixels_back_outside_a_patch(generator):
    clean, pixels = torch.rand(2, 2, 3, 6, 8, generator=generator)
    patch = Patch.rectangle((6, 8), (1, 2), (3, 4))
    assert torch.equal(patch.project(pixels, clean), torch.where(patch.mask, pixels, clean))


def test_a_linear_objective_under_a_patch_reaches_its_minimum(generator):
    images, weights = torch.rand(2, 3, 6, 8, generator=generator), torch.randn(3, 6, 8, generator=generator)
    patch = Patch.rectangle((6, 8), (1, 2), (3, 4))
    result = pgd(lambda pixels: (pixels * weights).flatten(1).sum(1), images, threat_model=patch, steps=10)
    best = torch.where(patch.mask, (weights < 0).float(), images)
    torch.testing.assert_close(result.images, best)


def test_a_linear_objective_in_an_l2_ball_reaches_its_minimum(generator):
    images, weights = torch.full((2, 3, 6, 8), 0.5), torch.randn(3, 6, 8, generator=generator)
    result = pgd(lambda pixels: (pixels * weights).flatten(1).sum(1), images, threat_model=L2(0.3), steps=10)
    torch.testing.assert_close(result.images, images - 0.3 * weights / weights.norm(), atol=1e-5, rtol=0)


def test_a_blank_start_knows_nothing_of_the_image(generator):
    images = torch.rand(2, 3, 4, 4, generator=generator)
    result = pgd(lambda pixels: pixels.flatten(1).sum(1), images, threat_model=Unconstrained(0.5), steps=0)
    assert torch.equal(result.images, torch.full_like(images, 0.5))


def test_an_epsilon_off_the_grid_is_refused_for_files():
    assert Linf(8 / 255).levels == 8 and Linf(1).levels == 255 and Linf(0).levels == 0
    with pytest.raises(ValueError, match="12.75 / 255. Take 12 / 255 or 13 / 255"):
        _ = Linf(0.05).levels


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: L2(-1), "`epsilon`"),
        (lambda: L2(float("inf")), "`epsilon`"),
        (lambda: Unconstrained(2), "`blank`"),
        (lambda: Patch(torch.zeros(3, 3, dtype=torch.bool)), "at least one True"),
        (lambda: Patch(torch.ones(3, 3)), "boolean"),
        (lambda: Patch.border((6, 8), 4), "`width` must lie in 1..3"),
        (lambda: Patch.rectangle((6, 8), (4, 4), (3, 3)), "inside an image"),
        (lambda: Patch.border((6, 8), 2.5), "`width` must be whole numbers of pixels, got 2.5"),
        (lambda: Patch.border((6.0, 8), 2), r"`image_size` must be whole numbers of pixels, got 6.0"),
        (lambda: Patch.rectangle((6, 8), (0.5, 1), (3, 3)), r"`corner` must be whole .*, got 0.5"),
        (lambda: Patch.rectangle((6, 8), (1, 1), (3, 3.0)), r"`size` must be whole .*, got 3.0"),
        (lambda: Patch.border((6, 8), 1).project(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)), "height and width"),
    ],
)
def test_threat_models_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1.0, 1e18, 1e36])
def test_an_l2_step_has_length_one_whatever_the_length_of_the_gradient(scale):
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    step = L2(1.0).descent_direction(gradient * scale)
    assert torch.allclose(step.flatten(1).norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(step, L2(1.0).descent_direction(gradient), atol=1e-4)


@pytest.mark.parametrize("attack", [pgd, adam_pgd, apgd, random_search])
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (8 / 255, r"0\.031.* \(float\)"),
        (Linf, "the class Linf"),
        ("linf", r"'linf' \(str\)"),
        (None, r"None \(NoneType\)"),
    ],
)
def test_what_is_no_threat_model_is_one_sentence(attack, given, got):
    with pytest.raises(TypeError, match=rf"`threat_model` must be a threat model such as Linf\(8 / 255\), got {got}"):
        attack(lambda pixels: pixels.sum((1, 2, 3)), torch.zeros(1, 3, 2, 2), threat_model=given, steps=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linf("8/255"), r"`epsilon` must be a number, got '8/255' \(str\)"),
        (lambda: L2(None), "`epsilon` must be a number, got None"),
        (lambda: Unconstrained("grey"), "`blank` must be a number, got 'grey'"),
        (lambda: Patch(torch.ones(2, 2, dtype=torch.bool), 8 / 255), "`within` must be a threat model"),
        (lambda: Patch([[True]]), r"`mask` must be a boolean tensor of shape \(H, W\), got list"),
    ],
)
def test_parts_of_a_threat_model_of_another_type_are_one_sentence(make, message):
    with pytest.raises(TypeError, match=message):
        make()
