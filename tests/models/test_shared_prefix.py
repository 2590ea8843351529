"""One picture against many targets: the lean loss equals the whole model's, chat by chat."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from image_attacks import Linf, load_png, pgd, save_png, target_nll, universal
from mm_cb.models.llava_next import LlavaNextModel
from mm_cb.models.shared_prefix import SharedPrefixTargets
from tests.models.test_last_positions import PROMPTS, TARGETS, with_gradient
from tests.tiny_llava import picture, tiny_llava


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def encoded(model, prompts=PROMPTS, targets=TARGETS, side="left"):
    pictures = [picture(0)] * len(prompts)
    return model.encode(prompts, pictures, completions=targets, close_turn=False, padding_side=side)


def whole_losses(model, inputs, pixel_values):
    values = pixel_values.expand(len(inputs.input_ids), *[-1] * (pixel_values.ndim - 1))
    return target_nll(model.forward(inputs, pixel_values=values).logits, inputs.labels)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 3], ids=["three prompts", "one prompt"])
def test_losses_and_gradients_are_those_of_the_whole_model(model, prompts, side):
    inputs = encoded(model, prompts, side=side)
    image = inputs.pixel_values[:1]
    expected, slope = with_gradient(lambda values: whole_losses(model, inputs, values), image)
    found, our_slope = with_gradient(SharedPrefixTargets(model, inputs), image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (our_slope - slope).norm() <= 1e-4 * slope.norm()
    assert (our_slope.sign() == slope.sign()).float().mean() > 0.9999


def test_the_loss_at_one_image_is_the_same_however_often_it_is_asked(model):
    """A key-value cache that is used twice grows, and the second loss is another one."""
    inputs = encoded(model)
    lean = SharedPrefixTargets(model, inputs)
    with torch.no_grad():
        first = lean(inputs.pixel_values[:1])
        assert all(torch.equal(lean(inputs.pixel_values[:1]), first) for _ in range(3))


def test_a_model_in_bfloat16_pulls_the_pixels_the_same_way(model):
    """Pixels stay float32, and nine in ten of their gradients keep their sign."""
    inputs, preprocess = encoded(model), model.preprocessing((42, 84))
    pixels = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[None].float() / 255
    slopes = []
    for base in (model.base, copy.deepcopy(model.base).bfloat16()):
        lean = SharedPrefixTargets(LlavaNextModel(base, model.processor), inputs)
        losses, slope = with_gradient(lambda values, lean=lean: lean(preprocess(values)), pixels)
        assert losses.dtype == slope.dtype == torch.float32
        slopes.append(slope)
    assert (slopes[0].sign() == slopes[1].sign()).float().mean() >= 0.9


def test_a_hijack_end_to_end_has_its_logged_loss_in_the_file(model, tmp_path):
    inputs, preprocess = encoded(model), model.preprocessing((42, 84))
    lean = SharedPrefixTargets(model, inputs)
    clean = torch.randint(0, 256, (3, 42, 84), generator=torch.Generator().manual_seed(7)) / 255
    found = universal(lambda pixels: lean(preprocess(pixels)), clean, attack=pgd, threat_model=Linf(32 / 255), steps=8)
    save_png(found.image, tmp_path / "made.png")
    assert ((load_png(tmp_path / "made.png") - clean) * 255).abs().max().round() <= 32
    reread = model.processor.image_processor([Image.open(tmp_path / "made.png")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(whole_losses(model, inputs, reread), found.losses, atol=1e-4, rtol=0)
        assert found.losses.mean() < lean(preprocess(clean.unsqueeze(0))).mean()


def test_chats_that_do_not_fit_together_are_refused(model):
    other = encoded(model)
    other.input_ids[1, other.image_mask[1].nonzero()[0, 0] - 1] = 7  # in front of the picture
    with pytest.raises(ValueError, match="must agree up to the end"):
        SharedPrefixTargets(model, other)
    with pytest.raises(ValueError, match="must agree up to the end"):
        SharedPrefixTargets(model, model.encode(["a"], [None], completions=["it"], close_turn=False))
    with pytest.raises(ValueError, match="at least one token"):
        SharedPrefixTargets(model, model.encode(["a"], [picture()]))


def test_wrong_images_and_a_training_model_are_refused(model):
    inputs = encoded(model)
    with pytest.raises(ValueError, match="must be one picture's"):
        SharedPrefixTargets(model, inputs)(inputs.pixel_values)
    model.base.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            SharedPrefixTargets(model, inputs)
    finally:
        model.base.eval()
