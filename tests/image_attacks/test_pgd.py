import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_attacks import (
    L2,
    AttackError,
    Linf,
    NonFiniteError,
    ObjectiveShapeError,
    Patch,
    Unconstrained,
    ZeroGradientError,
    adam_pgd,
    apgd,
    gradient_health,
    pgd,
    random_search,
)

from .helpers import eight_bit

SHAPE = (4, 3, 6, 5)


@pytest.fixture
def images(generator):
    return eight_bit(SHAPE, generator)


@pytest.fixture
def network():
    """A small non-convex objective, the same for every batch composition."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(96, 5)
        ).double()

    def objective(pixels):
        return layers(4 * pixels.double()).log_softmax(-1)[:, 0].neg()

    objective.layers = layers
    return objective


def linear(weights):
    return lambda pixels: (pixels * weights).flatten(1).sum(1)


def test_linear_objective_reaches_its_minimum_over_ball_and_box(images, generator):
    weights = torch.randn(SHAPE[1:], generator=generator)
    result = pgd(linear(weights), images, threat_model=Linf(8 / 255), steps=5)
    corner = (images - 8 / 255 * weights.sign()).clamp(0, 1)
    torch.testing.assert_close(result.images, corner)
    torch.testing.assert_close(result.losses, linear(weights)(corner))


def test_one_step_on_a_linear_objective_lowers_it(images, generator):
    objective = linear(torch.randn(SHAPE[1:], generator=generator))
    result = pgd(objective, images, threat_model=Linf(0.02), steps=1, step_size=0.005, keep="last")
    assert (result.losses < objective(images)).all()


def test_quadratic_objective_reaches_its_minimum_over_ball_and_box(images, generator):
    goal = 1.5 * torch.rand(SHAPE, generator=generator) - 0.25
    ball = Linf(16 / 255)
    result = pgd(lambda pixels: (pixels - goal).square().flatten(1).sum(1), images, threat_model=ball, steps=200)
    best = ball.project(goal, images)
    assert (result.images - best).abs().max() <= 1.5 / 255
    assert (result.images - best).abs().mean() <= 0.5 / 255


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    epsilon=st.integers(0, 255),
    steps=st.integers(0, 4),
    restarts=st.integers(1, 2),
    random_start=st.booleans(),
    momentum=st.sampled_from([0.0, 0.5, 1.0]),
    keep=st.sampled_from(["best", "last"]),
    schedule=st.sampled_from([None, "linear", "geometric", "constant"]),
)
def test_results_lie_in_ball_and_box_and_files_in_the_integer_ball(
    seed, epsilon, steps, restarts, random_start, momentum, keep, schedule
):
    generator = torch.Generator().manual_seed(seed)
    images = eight_bit(SHAPE, generator)
    images[0, :, 0], images[0, :, 1] = 0, 1
    weights = torch.randn(SHAPE[1:], generator=generator)
    seen = []

    def objective(pixels):
        seen.append(pixels.detach().clone())
        return torch.sin(pixels * weights * 9).flatten(1).sum(1)

    result = pgd(
        objective,
        images,
        threat_model=Linf(epsilon / 255),
        steps=steps,
        restarts=restarts,
        random_start=random_start,
        momentum=momentum,
        keep=keep,
        step_schedule=schedule,
        generator=generator,
    )
    for pixels in [result.images, *result.per_restart.images, *seen]:
        assert (pixels - images).abs().max() <= epsilon / 255 + 1e-6
        assert pixels.min() >= 0 and pixels.max() <= 1
        assert ((255 * pixels).round() - (255 * images).round()).abs().max() <= epsilon
    assert result.images.dtype == torch.float32 and not result.images.requires_grad


def test_epsilon_zero_leaves_the_images_unchanged(images, network):
    result = pgd(network, images, threat_model=Linf(0), steps=3, restarts=2)
    assert torch.equal(result.images, images)


def test_one_constant_step_with_the_last_iterate_is_fgsm(images, network):
    epsilon = 8 / 255
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(pixels).sum(), pixels)
    fgsm = (images - epsilon * gradient.sign()).clamp(0, 1)
    result = pgd(network, images, threat_model=Linf(epsilon), steps=1, step_size=epsilon, keep="last")
    torch.testing.assert_close(result.images, fgsm, atol=1e-6, rtol=0)


def test_textbook_configuration_equals_a_plain_loop(images, network):
    epsilon, alpha, pixels = 8 / 255, 2 / 255, images
    for _ in range(7):
        pixels = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network(pixels).sum(), pixels)
        pixels = images + (pixels.detach() - alpha * gradient.sign() - images).clamp(-epsilon, epsilon)
        pixels = pixels.clamp(0, 1)
    result = pgd(network, images, threat_model=Linf(epsilon), steps=7, step_size=alpha, keep="last")
    torch.testing.assert_close(result.images, pixels, atol=1e-6, rtol=0)


def test_best_is_never_worse_than_the_start_and_last_is_the_end_of_the_curve(images, network):
    wild = {"threat_model": Linf(64 / 255), "steps": 5, "step_size": 64 / 255}
    best, last = pgd(network, images, **wild), pgd(network, images, **wild, keep="last")
    assert (best.losses <= network(images)).all()
    assert torch.equal(best.losses, best.curves.amin(dim=(0, 1)))
    assert torch.equal(last.losses, last.curves[0, -1])
    assert (last.per_restart.steps == 5).all()


def test_the_kept_iterate_can_lie_in_the_middle(images):
    """Constant steps of 0.3 along one axis jump over the minimum at clean - 0.35 and back."""

    def objective(pixels):
        return (pixels - images + 0.35).square().flatten(1).sum(1)

    images = torch.full_like(images, 0.5)
    result = pgd(objective, images, threat_model=Linf(0.5), steps=2, step_size=0.3)
    assert result.per_restart.steps.unique().tolist() == [1]
    torch.testing.assert_close(result.images, images - 0.3)


def test_reported_losses_are_those_of_the_returned_images(images, network, generator):
    result = pgd(network, images, threat_model=Linf(0.1), steps=6, step_size=0.1, restarts=3, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(network(result.images), result.losses)
        for found, losses in zip(result.per_restart.images, result.per_restart.losses, strict=True):
            torch.testing.assert_close(network(found), losses)
    picked = result.curves.gather(1, result.per_restart.steps.unsqueeze(1)).squeeze(1)
    assert torch.equal(picked, result.per_restart.losses)


def test_best_over_restarts_is_taken_per_example_and_more_restarts_never_hurt(images, network):
    def attack(restarts):
        generator = torch.Generator().manual_seed(1)
        return pgd(network, images, threat_model=Linf(0.2), steps=3, restarts=restarts, generator=generator)

    few, many = attack(2), attack(4)
    assert torch.equal(many.losses, many.per_restart.losses.amin(0))
    assert (many.losses <= few.losses).all()
    assert torch.equal(many.curves[:2], few.curves)


def test_first_run_starts_at_the_image_and_later_runs_at_different_points(images, network):
    result = pgd(network, images, threat_model=Linf(0.1), steps=0, restarts=3)
    assert torch.equal(result.per_restart.images[0], images)
    assert not torch.equal(result.per_restart.images[1], images)
    assert not torch.equal(result.per_restart.images[1], result.per_restart.images[2])
    random = pgd(network, images, threat_model=Linf(0.1), steps=0, random_start=True)
    assert not torch.equal(random.images, images)


@pytest.mark.parametrize("threat_model", [Linf(0.1), L2(0.4), Unconstrained()], ids=lambda ball: type(ball).__name__)
def test_a_later_run_starts_on_the_other_side_of_what_the_run_before_found(images, network, threat_model):
    def start_of_second(seed):
        seen = []

        def recorded(pixels):
            seen.append(pixels.detach().clone())
            return network(pixels)

        generator = torch.Generator().manual_seed(seed)
        result = pgd(recorded, images, threat_model=threat_model, steps=3, restarts=2, generator=generator)
        return seen[4], result.per_restart.images[0]

    start, found = start_of_second(1)
    other_side = (start - images) * (found - images) <= 0
    no_other_side = (2 * images - start < 0) | (2 * images - start > 1)  # the mirrored value would be no pixel
    assert (other_side | no_other_side).all()
    moved = (start != images) & (found != images) & ~no_other_side
    assert moved.float().mean() > 0.3  # the law above speaks of many values
    torch.testing.assert_close(threat_model.project(start, images), start)
    assert not torch.equal(start, start_of_second(2)[0])


def test_every_later_run_turns_away_from_the_one_right_before_it(images, network):
    starts, images = [], 0.2 + 0.6 * images  # far from black and white

    def recorded(pixels):
        starts.append(pixels.detach().clone())
        return network(pixels)

    found = pgd(recorded, images, threat_model=Linf(0.1), steps=2, restarts=4).per_restart.images
    for run in (1, 2, 3):
        away, before = starts[3 * run] - images, found[run - 1] - images
        assert (away * before <= 0).all()
    assert not all((((starts[3 * run] - images) * (found[0] - images)) <= 0).all() for run in (2, 3))


@pytest.mark.parametrize("colour", [0.0, 1.0])
@pytest.mark.parametrize("threat_model", [Linf(0.1), L2(0.4), Unconstrained()], ids=lambda ball: type(ball).__name__)
def test_white_and_black_pictures_get_random_starts_too(network, colour, threat_model):
    """Nothing lies beyond white: there a value stays where it was drawn, not at the clean image."""
    images = torch.full(SHAPE, colour)
    plain = threat_model.random_start(images, torch.Generator().manual_seed(3))
    first = []

    def recorded(pixels):
        first.append(pixels.detach().clone())
        return network(pixels)

    generator = torch.Generator().manual_seed(3)
    pgd(recorded, images, threat_model=threat_model, steps=1, restarts=2, generator=generator)
    assert torch.equal(first[2], plain) and not torch.equal(plain, images)


def test_a_blank_start_is_mirrored_around_the_blank(images, network):
    starts = []

    def recorded(pixels):
        starts.append(pixels.detach().clone())
        return network(pixels)

    found = pgd(recorded, images, threat_model=Unconstrained(blank=0.5), steps=1, restarts=2).per_restart.images[0]
    assert ((starts[2] - 0.5) * (found - 0.5) <= 0).all()


def test_same_generator_same_images_and_the_global_state_is_left_alone(images, network):
    before = torch.random.get_rng_state()

    def attack(seed):
        generator = torch.Generator().manual_seed(seed)
        return pgd(network, images, threat_model=Linf(0.1), steps=3, random_start=True, generator=generator).images

    assert torch.equal(attack(1), attack(1))
    assert not torch.equal(attack(1), attack(2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_permuting_or_splitting_the_batch_gives_the_same_images(images, network):
    def attack(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return pgd(
            network, images[rows], threat_model=Linf(0.1), steps=4, restarts=2, momentum=0.5, generator=generators
        ).images

    whole = attack([0, 1, 2, 3])
    torch.testing.assert_close(attack([2, 0, 3, 1]), whole[[2, 0, 3, 1]])
    torch.testing.assert_close(torch.cat([attack([0]), attack([1, 2]), attack([3])]), whole)


def test_a_dominant_example_does_not_change_the_others(images, network):
    scale = torch.ones(len(images), dtype=torch.double)
    scale[0] = 1e6
    kinds = {"threat_model": Linf(0.1), "steps": 4, "momentum": 0.9}
    scaled = pgd(lambda pixels: scale * network(pixels), images, **kinds)
    torch.testing.assert_close(scaled.images, pgd(network, images, **kinds).images)


def test_no_parameter_gets_a_gradient_and_inputs_are_left_alone(images, network):
    before = images.clone()
    pgd(network, images, threat_model=Linf(0.1), steps=2, restarts=2)
    assert all(parameter.grad is None for parameter in network.layers.parameters())
    assert torch.equal(images, before) and not images.requires_grad and images.grad is None


def test_curves_and_calls_count_every_iterate_of_every_run(images, network):
    calls = []

    def objective(pixels):
        assert pixels.shape == images.shape
        calls.append(pixels.requires_grad)
        return network(pixels)

    seen = []
    result = pgd(
        objective,
        images,
        threat_model=Linf(0.1),
        steps=5,
        restarts=2,
        callback=lambda count, losses, pixels: seen.append((count, losses, pixels.clone())),
    )
    assert result.curves.shape == (2, 6, 4)
    assert result.per_restart.images.shape == (2, *SHAPE) and result.per_restart.losses.shape == (2, 4)
    assert calls == 2 * ([True] * 5 + [False])
    assert [count for count, _, _ in seen] == list(range(1, 13))
    assert torch.equal(torch.stack([losses for _, losses, _ in seen]).view(2, 6, 4), result.curves)
    assert all(torch.equal(network(pixels), losses) for _, losses, pixels in seen)


def test_zero_steps_only_evaluate(images, network):
    result = pgd(network, images, threat_model=Linf(0.1), steps=0)
    assert torch.equal(result.images, images) and result.curves.shape == (1, 1, 4)


def test_default_steps_fall_from_twice_epsilon_to_one_level():
    def path(**options):
        """The moves along a slope so long that the ball never stops them."""
        seen = []

        def objective(pixels):
            seen.append(pixels.detach().mean().item())
            return pixels.flatten(1).sum(1)

        pgd(objective, torch.ones(1, 1, 1, 1), threat_model=Linf(1.0), steps=4, **options)
        return [255 * (a - b) for a, b in zip(seen, seen[1:], strict=False)]

    assert path(step_size=0.1) == pytest.approx([25.5] * 4, abs=1e-3)
    assert path(step_size=27 / 255, step_schedule="geometric") == pytest.approx([27, 9, 3, 1], abs=1e-3)
    assert path(step_size=13 / 255, step_schedule="linear") == pytest.approx([13, 9, 5, 1], abs=1e-3)
    assert path(step_size=0.5 / 255, step_schedule="linear") == pytest.approx([0.5] * 4, abs=1e-3)

    from image_attacks.pgd import step_sizes

    default = step_sizes(Linf(8 / 255).step_range, 10, None, None)
    assert default[0] == pytest.approx(16 / 255) and default[-1] == pytest.approx(1 / 255)
    assert default == sorted(default, reverse=True)


def test_default_schedule_is_not_weaker_than_small_constant_steps(network, generator):
    images = eight_bit((32, *SHAPE[1:]), generator)
    attacks = {"threat_model": Linf(32 / 255), "steps": 20}
    default, constant = pgd(network, images, **attacks), pgd(network, images, **attacks, step_size=2 / 255)
    assert default.losses.mean() <= constant.losses.mean() * 1.001


def test_momentum_accumulates_normalised_gradients():
    """The second gradient is opposite but smaller in effect: with momentum 1 the first one still wins a tie."""
    slopes = iter([1.0, -100.0, 1.0])
    seen = []

    def objective(pixels):
        seen.append(pixels.detach().item())
        return next(slopes) * pixels.flatten(1).sum(1)

    images = torch.full((1, 1, 1, 1), 0.5)
    pgd(objective, images, threat_model=Linf(0.5), steps=2, step_size=0.1, momentum=1.0)
    assert seen == pytest.approx([0.5, 0.4, 0.4])


def test_a_detached_or_quantised_objective_raises(images, network):
    ball = Linf(0.1)
    with pytest.raises(ZeroGradientError, match="detaches"):
        pgd(lambda pixels: network(pixels.detach()), images, threat_model=ball)
    with pytest.raises(ZeroGradientError, match="detaches"):
        pgd(lambda pixels: pixels.detach().flatten(1).sum(1), images, threat_model=ball)
    with pytest.raises(ZeroGradientError, match="exactly zero"):
        pgd(lambda pixels: network((pixels * 255).round() / 255), images, threat_model=ball)


def test_vanished_cross_entropy_gradients_raise_and_a_margin_or_double_precision_helps(images, generator):
    weights = torch.randn(90, 5, generator=generator)

    def logits(pixels, dtype):
        return 1000 * pixels.flatten(1).to(dtype) @ weights.to(dtype)

    with torch.no_grad():
        winner = logits(images, torch.float32).argmax(1)

    def stay(pixels, dtype=torch.float32):
        return -torch.nn.functional.cross_entropy(logits(pixels, dtype), winner, reduction="none")

    def margin(pixels):
        values = logits(pixels, torch.float32)
        rows = torch.arange(len(values))
        return values[rows, winner] - values.scatter(1, winner.view(-1, 1), -torch.inf).amax(1)

    with pytest.raises(ZeroGradientError):
        pgd(stay, images, threat_model=Linf(0.1), steps=3)
    assert (pgd(margin, images, threat_model=Linf(0.3), steps=20).losses < 0).any()


def test_norms_are_those_of_the_gradients_however_small_they_are(images):
    scale = torch.tensor([1.0, 3.0, 1e-30, 0.0])
    result = pgd(
        lambda pixels: scale * pixels.square().flatten(1).sum(1), images, threat_model=Linf(0.1), steps=2, keep="last"
    )
    first = 2 * scale * images.flatten(1).norm(dim=1)
    torch.testing.assert_close(result.gradient_norms[0, 0], first, atol=0, rtol=1e-5)
    assert result.gradient_norms[0, 0, 2] > 0 and result.zero_gradients[0].sum(dim=0).tolist() == [0, 0, 0, 2]


def test_a_search_without_gradients_has_no_norms(images, network):
    result = random_search(network, images, threat_model=Linf(0.1), steps=3)
    assert result.gradient_norms.isnan().all() and not result.zero_gradients.any()


def test_examples_without_gradient_are_counted_not_hidden(images):
    active = torch.tensor([1.0, 0.0, 1.0, 0.0])
    result = pgd(lambda pixels: active * pixels.flatten(1).sum(1), images, threat_model=Linf(0.1), steps=3)
    assert result.zero_gradients.shape == (1, 3, 4)
    assert result.zero_gradients.sum(dim=(0, 1)).tolist() == [0, 3, 0, 3]
    assert torch.equal(result.images[1], images[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_and_names_the_images(images, network, bad):
    def objective(pixels):
        losses = network(pixels)
        return torch.where(torch.arange(4) == 2, bad, losses)

    with pytest.raises(NonFiniteError, match="objective is NaN or infinite at step 0 for images \\[2\\]"):
        pgd(objective, images, threat_model=Linf(0.1))


def test_a_gradient_that_is_not_finite_raises(images):
    def objective(pixels):
        return (pixels * 0).sqrt().flatten(1).sum(1)

    with pytest.raises(NonFiniteError, match="gradient"):
        pgd(objective, images, threat_model=Linf(0.1))


@pytest.mark.parametrize(
    "objective",
    [
        lambda pixels: pixels.sum(),
        lambda pixels: pixels.flatten(1).sum(1, keepdim=True),
        lambda pixels: pixels.sum().item(),
    ],
)
def test_an_objective_of_the_wrong_shape_raises(images, objective):
    with pytest.raises(ObjectiveShapeError, match="one value per image, shape \\(4,\\)"):
        pgd(objective, images, threat_model=Linf(0.1))
    assert issubclass(ObjectiveShapeError, AttackError)


def test_half_precision_losses_are_compared_in_float32(images):
    result = pgd(lambda pixels: pixels.flatten(1).sum(1).bfloat16(), images, threat_model=Linf(0.1), steps=2)
    assert result.losses.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)}, TypeError, "float32"),
        ({"images": torch.full((2, 3, 4, 4), 1.5)}, ValueError, "must lie in \\[0, 1\\]"),
        ({"images": torch.full((2, 3, 4, 4), float("nan"))}, ValueError, "must lie in \\[0, 1\\]"),
        ({"images": torch.zeros(3, 4, 4)}, ValueError, "shape \\(B, C, H, W\\)"),
        ({"steps": -1}, ValueError, "`steps`"),
        ({"restarts": 0}, ValueError, "`restarts`"),
        ({"steps": 2.5}, ValueError, "`steps` must be a whole number, got 2.5"),
        ({"steps": True}, ValueError, "`steps` must be a whole number, got True"),
        ({"steps": np.float32(2)}, ValueError, "`steps` must be a whole number"),
        ({"step_size": -1.0}, ValueError, "`step_size`"),
        ({"step_schedule": "quadratic"}, ValueError, "`step_schedule`"),
        ({"momentum": 2.0}, ValueError, "`momentum`"),
        ({"keep": "first"}, ValueError, "`keep`"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"images": torch.full((2, 3, 4, 4), 0.5), "threat_model": Linf(0.1), "steps": 1} | change
    with pytest.raises(error, match=message):
        pgd(lambda pixels: pixels.flatten(1).sum(1), arguments.pop("images"), **arguments)


def test_an_attack_under_no_grad_is_the_same_attack():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def objective(pixels):
        return (pixels - 0.3).square().flatten(1).sum(1)

    expected = pgd(objective, images, threat_model=Linf(8 / 255), steps=3)
    with torch.no_grad():
        found = pgd(objective, images, threat_model=Linf(8 / 255), steps=3)
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), -1.0])
def test_a_step_that_is_no_length_is_refused(size):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        pgd(lambda p: p.flatten(1).sum(1), torch.rand(1, 3, 4, 4), threat_model=Linf(0.1), steps=2, step_size=size)


def test_a_cosine_of_steps_falls_from_the_first_to_the_last_slowly_at_both_ends():
    from image_attacks.pgd import step_sizes

    sizes = step_sizes((1.0, 0.1), 101, 0.8, "cosine")
    assert sizes[0] == pytest.approx(0.8) and sizes[-1] == pytest.approx(0.1) and sizes == sorted(sizes, reverse=True)
    assert sizes[50] == pytest.approx(0.45) and sizes[0] - sizes[1] < sizes[49] - sizes[50] > sizes[99] - sizes[100]


ATTACKS = [pgd, adam_pgd, apgd, random_search]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("where", ["objective", "stop", "callback"])
def test_whoever_changes_the_pixels_it_is_shown_changes_nothing(images, generator, attack, where):
    """The law is the threat model's: nothing that is called on the way can lead out of it."""
    value = linear(torch.randn(SHAPE[1:], generator=generator))
    common = {"threat_model": Linf(8 / 255), "steps": 3, "restarts": 2}
    honest, before = attack(value, images, **common), images.clone()

    def meddle(pixels):
        preview = pixels.detach()
        preview.mul_(0)

    def meddling(pixels):
        losses = value(pixels)
        meddle(pixels)
        return losses

    def stop(pixels, losses):
        meddle(pixels)
        return torch.zeros(len(losses), dtype=torch.bool)

    calls = {"stop": stop, "callback": lambda done, losses, pixels: meddle(pixels), "objective": None}
    extra = {} if where == "objective" else {where: calls[where]}
    found = attack(meddling if where == "objective" else value, images, **common, **extra)
    assert torch.equal(found.images, honest.images) and torch.equal(found.losses, honest.losses)
    assert torch.equal(images, before)


def test_the_gradient_check_leaves_the_images_as_they_are(images):
    def meddling(pixels):
        losses = pixels.flatten(1).sum(1)
        pixels.detach().mul_(0)
        return losses

    before = images.clone()
    gradient_health(meddling, images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("made", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda made: made.__name__)
def test_whole_numbers_of_numpy_and_torch_are_what_pythons_are(made):
    def attacked(whole, real):
        images = torch.full((1, 3, 4, 4), 0.5)
        settings = {"threat_model": Linf(real(0.25)), "steps": whole(3), "restarts": whole(2)}
        stepped = {**settings, "step_size": real(0.125)}
        sum_of = lambda pixels: pixels.sum((1, 2, 3))  # noqa: E731
        found = [pgd(sum_of, images, **stepped, momentum=real(0.5)), adam_pgd(sum_of, images, **stepped)]
        found += [apgd(sum_of, images, **settings), random_search(sum_of, images, **settings)]
        masks = Patch.border((whole(6), 8), whole(2)).mask, Patch.rectangle((6, 8), (whole(0), 1), (whole(2), 2)).mask
        return [one.images for one in found] + list(masks)

    real = {np.array: np.float32, torch.tensor: torch.tensor}.get(made, np.float64)
    assert all(map(torch.equal, attacked(made, real), attacked(int, float)))
