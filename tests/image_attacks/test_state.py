"""Early stop, and going on after an interruption to the same bits."""

import pytest
import torch
from safetensors.torch import load, save

from image_attacks import (
    L2,
    Linf,
    ObjectiveShapeError,
    Patch,
    Rescale,
    ResumeError,
    adam_pgd,
    apgd,
    eot,
    pgd,
    random_search,
)

from .helpers import eight_bit

SHAPE = (4, 3, 6, 5)


@pytest.fixture
def images(generator):
    return eight_bit(SHAPE, generator)


def objective(pixels):
    weights = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(3))
    return torch.sin(9 * pixels * weights).flatten(1).mean(1)


def fields(result):
    return [
        *(result.images, result.losses, result.curves, result.gradient_norms.nan_to_num(-1), result.stopped),
        *(result.per_restart.images, result.per_restart.losses, result.per_restart.steps),
    ]


CASES = {
    "pgd": (pgd, {"momentum": 0.7}),
    "pgd, l2, random": (pgd, {"threat_model": L2(0.5), "random_start": True}),
    "pgd, stop": (pgd, {"stop": lambda pixels, losses: (losses < -0.28) & (torch.arange(4) < 2)}),
    "apgd": (apgd, {}),
    "adam_pgd": (adam_pgd, {}),
    "random_search": (random_search, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("one_generator", [True, False])
@pytest.mark.parametrize("at", [1, 7, 9, 20])
def test_an_interrupted_attack_ends_with_the_same_bits(images, case, one_generator, at):
    attack, changes = CASES[case]
    options = {"threat_model": Linf(0.1), "steps": 8, "restarts": 3} | changes

    def generator(seed):
        return torch.Generator().manual_seed(seed) if one_generator else [
            torch.Generator().manual_seed(seed + row) for row in range(4)
        ]  # fmt: skip

    saved = []

    def checkpoint(state):
        saved.append(save(state.state_dict()))  # as bytes: nothing is shared with the running attack
        if len(saved) == at:
            raise KeyboardInterrupt

    whole = attack(objective, images, generator=generator(1), **options)
    with pytest.raises(KeyboardInterrupt):
        attack(objective, images, generator=generator(1), checkpoint=checkpoint, **options)
    resumed = attack(objective, images, generator=generator(99), resume=load(saved[-1]), **options)
    assert all(torch.equal(a, b) for a, b in zip(fields(whole), fields(resumed), strict=True))


def test_the_draws_of_an_expectation_go_on_too_if_they_share_the_generator(images):
    def attack(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        noisy = eot(objective, [Rescale(0.5, 1)], samples=2, generator=generator)
        return pgd(noisy, images, threat_model=Linf(0.1), steps=6, restarts=2, generator=generator, **options)

    saved = []
    whole = attack(1, checkpoint=lambda state: saved.append(state.state_dict()))
    assert torch.equal(attack(5, resume=saved[7]).curves, whole.curves)


def test_a_saved_state_of_another_attack_is_refused(images):
    saved = []
    options = {"threat_model": Linf(0.1), "steps": 4}
    pgd(objective, images, **options, checkpoint=lambda state: saved.append(state.state_dict()))
    with pytest.raises(ResumeError, match="other images"):
        pgd(objective, images.flip(0), **options, resume=saved[1])
    for change in ({"steps": 5}, {"threat_model": Linf(0.2)}, {"momentum": 0.5}, {"restarts": 2}):
        with pytest.raises(ResumeError, match="other settings"):
            pgd(objective, images, **(options | change), resume=saved[1])
    with pytest.raises(ResumeError, match="other settings"):
        apgd(objective, images, **options, resume=saved[1])
    with pytest.raises(ResumeError, match="`AttackState.state_dict`"):
        pgd(objective, images, **options, resume={})


def test_a_saved_state_knows_the_mask_of_its_patch():
    """Both masks print alike in torch, which leaves out the middle of a large tensor."""
    images, saved = torch.rand(1, 3, 64, 64), []
    masks = [Patch.rectangle((64, 64), corner, (4, 4)) for corner in ((20, 20), (40, 40))]
    weights = torch.rand(3, 64, 64)

    def total(pixels):
        return (pixels * weights).flatten(1).sum(1)

    pgd(total, images, threat_model=masks[0], steps=3, checkpoint=lambda state: saved.append(state.state_dict()))
    with pytest.raises(ResumeError, match="other settings"):
        pgd(total, images, threat_model=masks[1], steps=3, resume=saved[1])
    pgd(total, images, threat_model=Patch(masks[0].mask.clone()), steps=3, resume=saved[1])


def test_a_stopped_image_is_returned_as_it_was_and_the_others_go_on(images):
    calls = []

    def counted(pixels):
        calls.append(pixels.shape)
        return objective(pixels)

    seen = []

    def stop(pixels, losses):
        seen.append(pixels.clone())
        return torch.tensor([len(seen) == 3, False, False, len(seen) == 13])

    options = {"threat_model": Linf(0.1), "steps": 8, "restarts": 2}
    free, held = pgd(objective, images, **options), pgd(counted, images, **options, stop=stop)
    assert held.stopped.tolist() == [True, False, False, True]
    assert torch.equal(held.images[0], seen[2][0]) and torch.equal(held.images[3], seen[12][3])
    assert all(torch.equal(later[0], seen[2][0]) for later in seen[2:])
    assert torch.equal(held.images[1:3], free.images[1:3])
    assert set(calls) == {SHAPE} and len(calls) == 18
    torch.testing.assert_close(held.losses, objective(held.images))


def test_success_counts_more_than_a_lower_loss_seen_before(images):
    def stop(pixels, losses):
        return torch.full((4,), pixels is not None and bool((pixels - images).abs().max() > 0.25))

    result = pgd(objective, images, threat_model=Linf(0.3), steps=4, step_size=0.15, stop=stop)
    assert result.stopped.all() and (result.per_restart.steps == 2).all()


def test_the_attack_ends_when_every_image_has_stopped(images):
    calls = []

    def counted(pixels):
        calls.append(None)
        return objective(pixels)

    options = {"threat_model": Linf(0.1), "steps": 8, "restarts": 3}
    result = pgd(counted, images, **options, stop=lambda pixels, losses: torch.ones(4, dtype=torch.bool))
    assert torch.equal(result.images, images) and result.stopped.all()
    assert result.curves.shape == (3, 9, 4) and result.gradient_norms.shape == (3, 8, 4) and len(calls) == 3
    assert result.gradient_norms[:, 1:].isnan().all() and not result.zero_gradients.any()  # nothing left to compute


def test_a_stop_rule_of_the_wrong_shape_raises(images):
    for answer in (True, torch.ones(3, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ObjectiveShapeError, match="`stop` must return one boolean per image"):
            pgd(objective, images, threat_model=Linf(0.1), stop=lambda pixels, losses, a=answer: a)
