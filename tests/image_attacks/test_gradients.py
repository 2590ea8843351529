"""Planted objectives with wrong gradients: the check must flag every one of them, and no honest one."""

import pytest
import torch

from image_attacks import ZeroGradientError, gradient_health

from .helpers import eight_bit


@pytest.fixture
def images(generator):
    return 0.2 + 0.6 * eight_bit((4, 3, 8, 8), generator)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
        ).requires_grad_(False)
    return lambda pixels: layers(pixels).log_softmax(1)[:, 0].neg()


def test_an_honest_gradient_is_healthy(images, network):
    health = gradient_health(network, images)
    assert health.ratios.shape == (5, 4) and health.zero_share.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(health.ratios, torch.ones(5, 4), atol=0.1, rtol=0)
    assert not health.suspicious().any()


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels):
        return pixels.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(-1)


PLANTED = {
    "sign flipped": lambda network: lambda pixels: network(2 * pixels.detach() - pixels),
    "another function's": lambda network: lambda pixels: network(Wrong.apply(pixels)),
    "half of it": lambda network: lambda pixels: network(0.5 * pixels + 0.5 * pixels.detach()),
    "quantised": lambda network: lambda pixels: network((pixels * 255).round() / 255),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_gradients_are_flagged(images, network, name):
    assert gradient_health(PLANTED[name](network), images).suspicious().all()


def test_saturated_cross_entropy_is_flagged_and_only_where_it_saturates(images, network):
    scale = torch.tensor([1.0, 0.0, 1.0, 1.0])
    health = gradient_health(lambda pixels: scale * network(pixels), images)
    assert health.suspicious().tolist() == [False, True, False, False] and health.zero_share[1] == 1


def test_no_gradient_at_all_raises(images, network):
    with pytest.raises(ZeroGradientError):
        gradient_health(lambda pixels: network(pixels.detach()), images)
