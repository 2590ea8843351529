"""Models whose weakness is known: the attack must find it, whatever hides the way."""

import pytest
import torch

from image_attacks import (
    Linf,
    Unconstrained,
    ZeroGradientError,
    adam_pgd,
    apgd,
    cross_entropy,
    dlr,
    gradient_health,
    margin,
    pgd,
    random_search,
)

from .helpers import eight_bit
from .networks import classifier, held_out


@pytest.mark.parametrize("attack", [pgd, apgd, adam_pgd])
def test_a_success_planted_inside_the_ball_is_found(attack, generator):
    """The loss is low only near a secret corner of the ball, with local minima on the way; small steps end in them."""
    images = eight_bit((40, 3, 6, 6), generator)
    secret = (images + 16 / 255 * torch.randn(images.shape, generator=generator).sign()).clamp(0, 1)

    def objective(pixels):
        away = (pixels - secret) * 255 / 16
        return (away.abs() + 0.15 * torch.sin(9 * away).abs()).flatten(1).mean(1)

    result = attack(objective, images, threat_model=Linf(16 / 255), steps=60, restarts=2)
    assert (result.losses < 0.25 * objective(images)).float().mean() >= 0.95


def test_masked_gradients_are_flagged_and_walked_around():
    """Logits times 10^5: torch's cross-entropy is flat in float32; ours, margin, DLR, random search are not fooled."""
    network = classifier(0, 0.0, epochs=3)
    images, labels = held_out(network, 20)

    def logits(pixels):
        return 1e5 * network(pixels)

    def flat(pixels):
        return -torch.nn.functional.cross_entropy(logits(pixels), labels, reduction="none")

    assert gradient_health(flat, images).suspicious().float().mean() > 0.9
    options = {"threat_model": Linf(64 / 255), "steps": 20}

    def broken(result):
        return (network(result.images).argmax(1) != labels).float().mean()

    try:
        stopped = broken(pgd(flat, images, **options))
    except ZeroGradientError:
        stopped = 0
    assert stopped < 0.5
    for loss in (cross_entropy, margin, dlr):
        assert broken(pgd(lambda pixels, f=loss: f(logits(pixels), labels), images, **options)) > 0.95
    searched = random_search(lambda pixels: margin(logits(pixels), labels), images, **(options | {"steps": 150}))
    assert broken(searched) > 0.5


def test_a_quantised_input_stops_the_white_box_but_not_transfer_nor_straight_through():
    network = classifier(0, 0.0, epochs=3)
    images, labels = held_out(network, 20)

    def coarse(pixels):
        return (pixels * 7).round() / 7

    def through(pixels):
        return pixels + (coarse(pixels) - pixels).detach()

    options = {"threat_model": Linf(64 / 255), "steps": 20}
    with pytest.raises(ZeroGradientError, match="rounded"):
        pgd(lambda pixels: cross_entropy(network(coarse(pixels)), labels), images, **options)
    transferred = pgd(lambda pixels: cross_entropy(network(pixels), labels), images, **options)
    straight = pgd(lambda pixels: cross_entropy(network(through(pixels)), labels), images, **options)
    for result in (transferred, straight):
        assert (network(coarse(result.images)).argmax(1) != labels).float().mean() > 0.9


def test_without_a_budget_every_image_of_every_model_falls():
    for hardening in (0.0, 16 / 255):
        network = classifier(0, hardening, epochs=3)
        images, labels = held_out(network, 20)
        for model in (Linf(1.0), Unconstrained(), Unconstrained(0.5)):
            result = pgd(lambda p, n=network, y=labels: cross_entropy(n(p), y), images, threat_model=model, steps=30)
            assert (network(result.images).argmax(1) != labels).all()
