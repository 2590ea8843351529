"""Small classifiers trained in seconds on scikit-learn's 8 x 8 digits: standard, and adversarially."""

import functools

import torch
import torch.nn.functional as F

from image_attacks import Linf


@functools.cache
def digits():
    """Images (1797, 1, 8, 8) in [0, 1] on the 8-bit grid, and their classes, in a fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    levels = (torch.from_numpy(data.images).float() * 255 / 16).round()
    return (levels / 255).unsqueeze(1)[order], torch.from_numpy(data.target).long()[order]


@functools.cache
def classifier(seed, adversarial_epsilon=0.0, epochs=8):
    """A CNN of about 10 000 parameters; the last 297 digits are never trained on."""
    images, labels = (part[:1500] for part in digits())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU()),
            *(torch.nn.Conv2d(16, 16, 3, stride=2, padding=1), torch.nn.ReLU()),
            *(torch.nn.Flatten(), torch.nn.Linear(256, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)),
        )
        optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(100):
                batch = _hardened(network, images[rows], labels[rows], adversarial_epsilon)
                optimiser.zero_grad()
                F.cross_entropy(network(batch), labels[rows]).backward()
                optimiser.step()
    return network.eval().requires_grad_(False)


def _hardened(network, images, labels, epsilon, steps=4):
    if not epsilon:
        return images
    ball, pixels = Linf(epsilon), images + epsilon * (2 * torch.rand_like(images) - 1)
    for _ in range(steps):
        pixels = ball.project(pixels, images).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(pixels), labels), pixels)
        pixels = (pixels + 0.5 * epsilon * gradient.sign()).detach()
    return ball.project(pixels, images)


def held_out(network, count=None):
    """The first so many held-out digits that the network gets right; None for all."""
    images, labels = (part[1500:] for part in digits())
    right = (network(images).argmax(1) == labels).nonzero().flatten()[:count]
    return images[right], labels[right]
