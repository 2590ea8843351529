import io

import pytest
import torch
from PIL import Image

from image_attacks import (
    Crop,
    Jpeg,
    Linf,
    ObjectiveShapeError,
    Rescale,
    adam_pgd,
    apgd,
    eot,
    pgd,
    random_search,
    sign_noise,
    universal,
)

from .helpers import eight_bit


@pytest.fixture
def image(generator):
    return eight_bit((3, 12, 10), generator)


@pytest.mark.parametrize("attack", [pgd, apgd, adam_pgd, random_search])
def test_one_image_lowers_the_mean_of_many_objectives(image, attack, generator):
    weights = torch.randn(5, 3, 12, 10, generator=generator)
    shapes = []

    def objectives(pixels):
        shapes.append(tuple(pixels.shape))
        return (pixels * weights).flatten(1).sum(1)

    found = universal(objectives, image, attack=attack, threat_model=Linf(8 / 255), steps=10)
    assert set(shapes) == {(1, 3, 12, 10)} and found.losses.shape == (5,)
    torch.testing.assert_close(found.losses.mean(), found.result.losses[0])
    assert found.losses.mean() < objectives(image.unsqueeze(0)).mean()
    if attack is not random_search:
        torch.testing.assert_close(found.image, (image - 8 / 255 * weights.mean(0).sign()).clamp(0, 1))


def test_objectives_of_the_wrong_shape_raise(image):
    with pytest.raises(ObjectiveShapeError, match="one value per target"):
        universal(lambda pixels: pixels.sum(), image, threat_model=Linf(0.1))
    with pytest.raises(ValueError, match="`image` must have shape"):
        universal(lambda pixels: pixels.flatten(1).sum(1), image.unsqueeze(0), threat_model=Linf(0.1))


@pytest.mark.parametrize("kind", [Rescale(), Crop()], ids=str)
def test_a_white_picture_stays_a_picture(kind, generator):
    """Weights of a resize add up to one up to rounding: unclamped, half of the draws leave [0, 1] by 1e-7."""
    for _ in range(40):
        shown = kind(torch.ones(1, 3, 42, 84), generator)
        assert shown.max() <= 1 and shown.min() >= 0


@pytest.mark.parametrize("kind", [Rescale(0.4, 0.6), Crop(0.5, 0.9), Jpeg(30, 90)], ids=str)
def test_transformations_keep_shape_and_range_and_let_gradients_through(kind, image):
    pixels = image.unsqueeze(0).requires_grad_()
    draw = kind(pixels, torch.Generator().manual_seed(1))
    assert draw.shape == pixels.shape and draw.min() >= 0 and draw.max() <= 1
    assert not torch.allclose(draw, pixels)
    (gradient,) = torch.autograd.grad(draw.sum(), pixels)
    assert gradient.abs().sum() > 0
    assert torch.equal(draw, kind(pixels, torch.Generator().manual_seed(1)))


def test_jpeg_shows_what_a_jpeg_file_holds_and_hands_the_gradient_straight_through(image):
    pixels = image.unsqueeze(0).requires_grad_()
    shown = Jpeg(50, 50)(pixels, torch.Generator())
    file = io.BytesIO()
    levels = (image.detach() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(file, format="JPEG", quality=50)
    reread = torch.tensor(list(Image.open(file).convert("RGB").tobytes())).view(12, 10, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(shown[0], reread)
    weights = torch.randn_like(pixels)
    assert torch.equal(torch.autograd.grad((shown * weights).sum(), pixels)[0], weights)


def test_an_attack_over_rescaling_survives_it_better_than_one_without(generator):
    images = eight_bit((6, 3, 16, 16), generator)
    weights = torch.randn(3, 16, 16, generator=generator)

    def objective(pixels):
        return (pixels * weights).flatten(1).sum(1)

    def judged(pixels):
        fresh = eot(objective, [Rescale(0.3, 0.7)], samples=40, generator=torch.Generator().manual_seed(9))
        return fresh(pixels).mean()

    draws = torch.Generator().manual_seed(1)
    robust = eot(objective, [Rescale(0.3, 0.7)], samples=4, generator=draws)
    options = {"threat_model": Linf(16 / 255), "steps": 20}
    plain, careful = pgd(objective, images, **options), pgd(robust, images, **options, generator=draws)
    clean, gain = judged(images), judged(careful.images)
    assert gain < judged(plain.images) < clean and gain < judged(sign_noise(images, 16 / 255))


def test_averaging_beats_a_model_that_hides_its_gradient_in_noise(generator):
    images, weights = eight_bit((4, 3, 8, 8), generator), torch.randn(3, 8, 8, generator=generator)
    noise = torch.Generator().manual_seed(5)

    def random_model(pixels):
        drawn = weights + 8 * torch.randn(weights.shape, generator=noise)
        return (pixels * drawn).flatten(1).sum(1)

    def true_loss(result):
        return (result.images * weights).flatten(1).sum(1).mean()

    options = {"threat_model": Linf(16 / 255), "steps": 10, "keep": "last"}
    single = pgd(random_model, images, **options)
    averaged = pgd(eot(random_model, [], samples=64, generator=noise), images, **options)
    best = (images - 16 / 255 * weights.sign()).clamp(0, 1)
    gain = (images * weights).flatten(1).sum(1).mean() - (best * weights).flatten(1).sum(1).mean()
    clean = (images * weights).flatten(1).sum(1).mean()
    assert clean - true_loss(averaged) > 0.6 * gain > clean - true_loss(single)


@pytest.mark.parametrize("build", [lambda: Rescale(0, 1), lambda: Crop(0.5, 2), lambda: Jpeg(90, 50)])
def test_ranges_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="low <= high"):
        build()


def test_no_samples_are_refused(generator):
    with pytest.raises(ValueError, match="`samples`"):
        eot(lambda pixels: pixels.flatten(1).sum(1), [], samples=0, generator=generator)


def test_objectives_that_change_what_they_are_shown_change_nothing(image, generator):
    weights = torch.randn(3, 3, 12, 10, generator=generator)

    def honest(pixels):
        return (pixels * weights).flatten(1).sum(1)

    def meddling(pixels):
        losses = honest(pixels)
        pixels.detach().mul_(0)
        return losses

    common = {"threat_model": Linf(8 / 255), "steps": 3}
    assert torch.equal(universal(meddling, image, **common).image, universal(honest, image, **common).image)

    def each_sample(objective):
        first = eot(lambda pixels: objective(pixels).mean(0, keepdim=True), [], samples=2, generator=generator)
        return first(image.unsqueeze(0).clone())

    assert torch.equal(each_sample(meddling), each_sample(honest))
