"""PGD with Adam's steps, held against torch's own Adam."""

import pytest
import torch

from image_attacks import L2, Linf, Patch, Unconstrained, adam_pgd, pgd

from .helpers import eight_bit

SHAPE = (3, 3, 6, 5)


@pytest.fixture
def images(generator):
    return eight_bit(SHAPE, generator)


def test_inside_the_ball_the_steps_are_those_of_torch_s_adam(generator):
    weights = torch.randn(SHAPE[1:], generator=generator)
    images = torch.full(SHAPE, 0.5)

    def objective(pixels):
        return torch.sin(9 * pixels * weights).flatten(1).sum(1)

    ours = []
    adam_pgd(
        lambda pixels: (ours.append(pixels.detach().clone()), objective(pixels))[1],
        images,
        threat_model=Linf(0.5),
        steps=12,
        step_size=0.01,
        step_schedule="constant",
        betas=(0.8, 0.95),
    )
    theirs = images.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-8)
    for pixels in ours:
        torch.testing.assert_close(pixels, theirs.detach(), atol=1e-6, rtol=0)
        (gradient,) = torch.autograd.grad(objective(theirs).sum(), theirs)
        theirs.grad = gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        optimiser.step()
    assert len(ours) == 13 and (ours[-1] - images).abs().max() > 0.05


def test_a_linear_objective_reaches_its_minimum_over_ball_and_box(images, generator):
    weights = torch.randn(SHAPE[1:], generator=generator)
    result = adam_pgd(lambda pixels: (pixels * weights).flatten(1).sum(1), images, threat_model=Linf(8 / 255), steps=5)
    torch.testing.assert_close(result.images, (images - 8 / 255 * weights.sign()).clamp(0, 1))


def test_a_value_whose_gradient_flickers_takes_smaller_steps(generator):
    """Half of the values see a random gradient at every step; steps by the sign are as long there as elsewhere."""
    noisy = torch.zeros(SHAPE[1:], dtype=torch.bool)
    noisy[:, :, :2] = True
    images = torch.full(SHAPE, 0.5)

    def objective(pixels):
        seen.append(pixels.detach().clone())
        signs = torch.where(noisy, torch.randn(SHAPE[1:], generator=generator), torch.ones(SHAPE[1:]))
        return (pixels * signs).flatten(1).sum(1)

    settings = {"threat_model": Linf(0.5), "steps": 20, "step_size": 0.01, "step_schedule": "constant"}
    length = {}
    for attack in (pgd, adam_pgd):
        seen = []
        attack(objective, images, **settings)
        steps = torch.stack(seen).diff(dim=0)[5:].abs()
        length[attack] = [steps[:, :, part].mean().item() for part in (noisy, ~noisy)]
    assert length[pgd] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert length[adam_pgd][0] < 0.4 * length[adam_pgd][1]


@pytest.mark.parametrize("threat_model", [Linf(0.1), Unconstrained(0.5)], ids=["linf", "blank"])
def test_the_scale_of_an_image_s_loss_does_not_matter(images, generator, threat_model):
    weights = torch.randn(SHAPE[1:], generator=generator)

    def objective(scale):
        return lambda pixels: scale * torch.sin(5 * pixels * weights).flatten(1).sum(1)

    small, large = (
        adam_pgd(objective(scale), images, threat_model=threat_model, steps=6).images for scale in (2**-12, 2**12)
    )
    torch.testing.assert_close(small, large, atol=1e-5, rtol=0)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_decays_outside_their_range_are_refused(images, betas):
    with pytest.raises(ValueError, match=r"`betas` must lie in \[0, 1\)"):
        adam_pgd(lambda pixels: pixels.sum((1, 2, 3)), images, threat_model=Linf(0.1), betas=betas)


@pytest.mark.parametrize("threat_model", [L2(0.5), Patch.border(SHAPE[-2:], 1, L2(0.5))], ids=["ball", "patch"])
def test_an_l2_ball_is_refused(images, threat_model):
    with pytest.raises(ValueError, match="does not suit an l-2 ball"):
        adam_pgd(lambda pixels: pixels.sum((1, 2, 3)), images, threat_model=threat_model)
