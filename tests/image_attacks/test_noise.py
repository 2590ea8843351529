import pytest
import torch

from image_attacks import Linf, sign_noise


def test_noise_has_size_epsilon_everywhere_except_at_the_edge_of_the_box(generator):
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 20, 20)
    noise = sign_noise(images, 0.1, generator) - images
    torch.testing.assert_close(noise[1].abs(), torch.full_like(noise[1], 0.1))
    assert noise[0].unique().tolist() == pytest.approx([0.0, 0.1])
    assert 0.4 < (noise[1] > 0).float().mean() < 0.6


def test_same_generator_same_noise_and_the_global_state_is_left_alone():
    images = torch.full((2, 3, 5, 5), 0.5)
    before = torch.random.get_rng_state()
    one, two = (sign_noise(images, 0.1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, sign_noise(images, 0.1, torch.Generator().manual_seed(4)))
    assert torch.equal(sign_noise(images, 0.1), sign_noise(images, 0.1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_generator_per_image_makes_the_draws_independent_of_the_batch():
    images = torch.full((3, 3, 5, 5), 0.5)

    def seeded(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    whole = sign_noise(images, 0.1, seeded([0, 1, 2]))
    assert torch.equal(whole[1:2], sign_noise(images[1:2], 0.1, seeded([1])))
    start = Linf(0.1).random_start(images, seeded([0, 1, 2]))
    assert torch.equal(start[[2, 0]], Linf(0.1).random_start(images[:2], seeded([2, 0])))


def test_a_generator_per_image_is_counted():
    with pytest.raises(ValueError, match="one generator per image, got 1 for 2"):
        sign_noise(torch.rand(2, 3, 4, 4), 0.1, [torch.Generator()])
