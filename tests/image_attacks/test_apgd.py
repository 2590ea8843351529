import itertools

import pytest
import torch

from image_attacks import L2, Linf, Patch, adam_pgd, apgd, pgd, random_search
from image_attacks.apgd import _intervals

from .helpers import eight_bit

SHAPE = (6, 3, 5, 4)


@pytest.fixture
def images(generator):
    return eight_bit(SHAPE, generator)


@pytest.fixture
def weights(generator):
    return torch.randn(SHAPE[1:], generator=generator)


def wavy(weights):
    return lambda pixels: torch.sin(9 * pixels * weights).flatten(1).sum(1) + (pixels * weights).flatten(1).sum(1)


def test_checkpoints_follow_the_paper():
    ends = [end for _, end in _intervals(100)]
    assert ends == [22, 41, 57, 70, 80, 87, 93, 99]
    assert all(end <= 7 for _, end in _intervals(7))


def test_linear_objective_reaches_its_minimum(images, weights):
    result = apgd(lambda pixels: (pixels * weights).flatten(1).sum(1), images, threat_model=Linf(8 / 255), steps=5)
    torch.testing.assert_close(result.images, (images - 8 / 255 * weights.sign()).clamp(0, 1))


def test_first_step_is_twice_epsilon_and_the_second_carries_a_quarter_of_the_first_displacement():
    seen = []

    def objective(pixels):
        seen.append(pixels.item())
        return (pixels * 1.0).flatten(1).sum(1) if len(seen) != 2 else (-pixels).flatten(1).sum(1)

    apgd(objective, torch.full((1, 1, 1, 1), 0.9), threat_model=Linf(0.1), steps=2)
    assert seen[0] == pytest.approx(0.9) and seen[1] == pytest.approx(0.8)
    assert seen[2] == pytest.approx(0.8 + 0.75 * (1.0 - 0.8) + 0.25 * (0.8 - 0.9))


def test_a_stalled_image_halves_its_step_and_goes_back_to_its_best_point():
    """On |x - goal| with steps of 2 epsilon the iterates jump from end to end until the steps are small enough."""
    seen, goal = [], 0.513

    def objective(pixels):
        seen.append(pixels.flatten().tolist())
        return (pixels - goal).abs().flatten(1).sum(1)

    images = torch.full((1, 1, 1, 1), 0.52)
    apgd(objective, images, threat_model=Linf(0.2), steps=100)
    values = [abs(row[0] - goal) for row in seen]
    assert min(values[:20]) == pytest.approx(0.007, abs=1e-6)  # nothing better than the start with the first step
    assert min(values) < 0.002
    # The first checkpoint is iterate 22: from there on from the best point so far, 0.52, with half the step.
    back = 0.52 + 0.75 * (0.32 - 0.52) + 0.25 * (0.52 - seen[21][0])
    assert min(values[:23]) == pytest.approx(0.007, abs=1e-6) and seen[23][0] == pytest.approx(back, abs=1e-5)
    moves = [abs(b[0] - a[0]) for a, b in zip(seen, seen[1:], strict=False)]
    assert max(moves[-10:]) < 0.05 < max(moves[:20])


@pytest.mark.parametrize("successes", [14, 15])
def test_a_checkpoint_counts_the_successes_since_the_last_one_alone(successes):
    """All 22 steps up to the first checkpoint lower the loss; of the 19 up to the second, three quarters must, 14.25.

    The slope is 1, so that the iterates stand at the ball's lower end. Only at the best point before the second
    checkpoint it is -1: an image whose step is halved there goes back to that point and from it half as far up.
    """
    best, seen = 22 + successes, []

    def objective(pixels):
        step = len(seen)
        seen.append(pixels.item())
        slope = -1.0 if step == best else 1.0
        return (slope * (pixels - pixels.detach())).flatten(1).sum(1) - min(step, best)

    apgd(objective, torch.full((1, 1, 1, 1), 0.5), threat_model=Linf(0.1), steps=100)
    assert seen[22:best] == pytest.approx([0.4] * successes) and seen[41] == pytest.approx(0.4)
    assert seen[42] == pytest.approx(0.4 + 0.75 * 0.1 if successes < 14.25 else 0.4)


@pytest.mark.parametrize(("raised", "stuck"), [(0, True), (-10, False)])
def test_an_image_whose_best_is_that_of_the_last_checkpoint_is_stuck_however_many_steps_lowered_its_loss(raised, stuck):
    """The loss falls to -22 at the first checkpoint, is raised there, and falls again, by 18 up to the second.

    As above, the slope is -1 at the first checkpoint's point alone, to which a stuck image goes back.
    """
    seen = []

    def objective(pixels):
        step = len(seen)
        seen.append(pixels.item())
        slope = -1.0 if step == 22 else 1.0
        value = -step if step <= 22 else raised - (step - 23)
        return (slope * (pixels - pixels.detach())).flatten(1).sum(1) + value

    apgd(objective, torch.full((1, 1, 1, 1), 0.5), threat_model=Linf(0.1), steps=100)
    assert seen[22] == pytest.approx(0.4) and seen[41] == pytest.approx(0.4)
    assert seen[42] == pytest.approx(0.4 + 0.75 * 0.1 if stuck else 0.4)


@pytest.mark.parametrize(
    ("attack", "threat_model"),
    [
        *itertools.product([apgd, adam_pgd, random_search], [Linf(0.1), Patch.border((5, 4), 1, Linf(0.3))]),
        *itertools.product([apgd, random_search], [L2(0.5)]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_laws_shared_with_pgd(images, weights, attack, threat_model):
    objective = wavy(weights)

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return attack(objective, images[rows], threat_model=threat_model, steps=15, restarts=2, generator=generators)

    result = run([0, 1, 2, 3, 4, 5])
    assert (result.losses <= objective(images)).all() and result.curves.shape == (2, 16, 6)
    torch.testing.assert_close(objective(result.images), result.losses)
    assert torch.equal(result.losses, result.curves.amin(dim=(0, 1)))
    torch.testing.assert_close(threat_model.project(result.images, images), result.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(run([3, 0]).images, result.images[[3, 0]])


def test_random_search_needs_no_gradient_and_beats_random_noise_of_equal_count(images, weights, generator):
    def levels(pixels):
        assert not pixels.requires_grad
        return wavy(weights)((pixels * 8).round() / 8)

    ball = Linf(0.25)
    found = random_search(levels, images, threat_model=ball, steps=150).losses
    noise = torch.stack([levels(ball.random_start(images, generator)) for _ in range(151)]).amin(0)
    assert found.mean() < noise.mean() and (found <= levels(images)).all()


def test_gradients_beat_random_search_at_equal_forward_passes(images, weights):
    options = {"threat_model": Linf(0.1), "steps": 60}
    white = pgd(wavy(weights), images, **options).losses
    assert (white <= random_search(wavy(weights), images, **options).losses + 1e-6).all()
