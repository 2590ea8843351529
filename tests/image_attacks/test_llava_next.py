"""The lean target loss equals the whole model's, for one image per chat and for one image against many."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from image_attacks import (
    Linf,
    LlavaNextPreprocessing,
    LlavaNextTargets,
    load_png,
    only_last_positions,
    pgd,
    save_png,
    target_nll,
    universal,
)
from tests.tiny_llava import picture, tiny_llava

PROMPTS = ["what is in the picture", "tell me how to brew tea", "what is a red square"]
TARGETS = ["a red circle", "no i can not", "it"]


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def encoded(model, prompts=PROMPTS):
    """The batch as the model's own forward takes it, and the same chats split into prompts and targets."""
    pictures = [picture(seed) for seed in range(len(prompts))]
    inputs = model.encode(prompts, pictures, completions=TARGETS, close_turn=False, padding_side="right")
    rows = [ids[mask.bool()] for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)]
    lengths = inputs.completion_mask.sum(1).tolist()
    heads = [row[:-length] for row, length in zip(rows, lengths, strict=True)]
    return inputs, heads, [row[-length:] for row, length in zip(rows, lengths, strict=True)]


def with_gradient(function, pixel_values):
    pixel_values = pixel_values.clone().requires_grad_()
    losses = function(pixel_values)
    return losses.detach(), torch.autograd.grad(losses.sum(), pixel_values)[0]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 3], ids=["three prompts", "one prompt"])
@pytest.mark.parametrize("universal_image", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_model(model, prompts, universal_image):
    inputs, heads, targets = encoded(model, prompts)
    images = inputs.pixel_values[:1] if universal_image else inputs.pixel_values

    def whole(pixel_values):
        values = pixel_values.expand(3, -1, -1, -1, -1)
        return target_nll(model.forward(inputs, pixel_values=values).logits, inputs.labels)

    lean = LlavaNextTargets(model.base, heads, targets, (42, 84))
    (expected, slope), (found, our_slope) = with_gradient(whole, images), with_gradient(lean, images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (our_slope - slope).norm() <= 1e-4 * slope.norm()
    assert torch.equal(our_slope.sign(), slope.sign()) or (our_slope.sign() == slope.sign()).float().mean() > 0.9999


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts", [PROMPTS, ["tell me"] * 3], ids=["padded", "nearly equal"])
@pytest.mark.parametrize("count", [1, 4, 100])
def test_the_last_positions_alone_say_what_the_whole_model_says_there(attention, prompts, count):
    model = tiny_llava()
    model.base.set_attn_implementation(attention)
    inputs = model.encode(prompts, [picture(seed) for seed in range(3)], completions=TARGETS, close_turn=False)
    seen = {}

    def run(pixel_values):
        output = model.forward(inputs, pixel_values=pixel_values, logits_to_keep=count, hidden_states=True)
        seen["states"] = [states[:, -count:].detach() for states in output.hidden_states]
        return output.logits.float().log_softmax(-1).flatten(1).square().sum(1)

    expected, slope = with_gradient(run, inputs.pixel_values)
    states = seen["states"]
    with only_last_positions(model.base, count):
        found, our_slope = with_gradient(run, inputs.pixel_values)
    torch.testing.assert_close(found, expected)
    assert (our_slope - slope).norm() <= 1e-5 * slope.norm()
    for ours, theirs in zip(seen["states"], states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rows_of_one_length_without_a_mask_stay_causal():
    """No mask means "causal" to a block that sees all tokens; with fewer queries than keys it is read otherwise."""
    model = tiny_llava()
    inputs = model.encode(PROMPTS[:1], [picture(0)], completions=TARGETS[:1], close_turn=False)
    with torch.no_grad():
        whole = model.forward(inputs, logits_to_keep=3).logits
        with only_last_positions(model.base, 3):
            masks = []
            attention = model.base.model.language_model.layers[-1].self_attn
            hook = attention.register_forward_pre_hook(
                lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
            ours = model.forward(inputs, logits_to_keep=3).logits
            hook.remove()
    torch.testing.assert_close(ours, whole)
    assert masks[0].shape[-2:] == (3, inputs.input_ids.shape[1]) and not masks[0][0, 0, 0, -2:].any()


def test_what_is_not_looked_at_is_not_computed():
    """The image tower's last layer is full of NaN, and nobody notices."""
    model = tiny_llava()
    for weights in model.base.model.vision_tower.encoder.layers[-1].parameters():
        weights.data.fill_(torch.nan)
    inputs = model.encode(PROMPTS, [picture(seed) for seed in range(3)], completions=TARGETS, close_turn=False)
    with only_last_positions(model.base, 2):
        rows, logits = rows_in_the_last_block(model, lambda: model.forward(inputs, logits_to_keep=2).logits)
    assert logits.isfinite().all() and rows == [2]


def rows_in_the_last_block(model, run):
    """How many positions its feed-forward part sees while ``run`` runs."""
    rows = []
    hook = model.base.model.language_model.layers[-1].mlp.register_forward_hook(
        lambda module, args, output: rows.append(output.shape[1])
    )
    with torch.no_grad():
        result = run()
    hook.remove()
    return rows, result


def test_a_block_of_another_build_runs_whole():
    """Keys without positions, say: what this package cannot compute by itself it leaves to the model."""
    model = tiny_llava()
    inputs = model.encode(PROMPTS, [picture(seed) for seed in range(3)], completions=TARGETS, close_turn=False)
    block = model.base.model.language_model.layers[-1]
    block.__class__ = type("OtherDecoderLayer", (type(block),), {})
    with torch.no_grad():
        whole = model.forward(inputs, logits_to_keep=2).logits
    with only_last_positions(model.base, 2):
        rows, found = rows_in_the_last_block(model, lambda: model.forward(inputs, logits_to_keep=2).logits)
    assert torch.equal(found, whole) and rows == [inputs.input_ids.shape[1]]


def test_attention_that_was_not_tried_runs_whole_and_a_training_model_is_refused():
    model = tiny_llava()
    block = model.base.model.language_model.layers[-1]
    model.base.model.language_model.config._attn_implementation = "flash_attention_2"
    with only_last_positions(model.base, 2):
        assert "forward" not in block.__dict__
    model.base.train()
    with pytest.raises(ValueError, match="evaluation mode"), only_last_positions(model.base, 2):
        pass


@pytest.mark.parametrize("window", [4, 8, 64])
def test_a_sliding_window_shorter_than_the_row(window):
    model = tiny_llava()
    model.base.model.language_model.config.sliding_window = window
    model.base.model.language_model.layers[-1].self_attn.config.sliding_window = window
    inputs = model.encode(PROMPTS, [picture(seed) for seed in range(3)], completions=TARGETS, close_turn=False)
    with torch.no_grad():
        whole = model.forward(inputs, logits_to_keep=3).logits
    with only_last_positions(model.base, 3):
        rows, found = rows_in_the_last_block(model, lambda: model.forward(inputs, logits_to_keep=3).logits)
    torch.testing.assert_close(found, whole)
    assert rows == [3]


@pytest.mark.parametrize(("layer", "unused"), [(-1, 0), (-2, 1), (1, 2), (2, 1), ([1, -2], 1), ([-3, 1], 2)])
def test_layers_of_the_image_tower_behind_the_used_one_do_nothing(layer, unused):
    model = tiny_llava()
    layers = model.base.model.vision_tower.encoder.layers
    model.base.config.vision_feature_layer = layer
    with only_last_positions(model.base, 1):
        idle = [block for block in layers if "forward" in block.__dict__]
    assert idle == list(layers)[len(layers) - unused :]


def test_an_image_tower_of_another_build_is_left_alone():
    model = tiny_llava()
    model.base.model.vision_tower.stages = model.base.model.vision_tower.encoder
    del model.base.model.vision_tower.encoder
    with only_last_positions(model.base, 1):
        assert all("forward" not in block.__dict__ for block in model.base.model.vision_tower.stages.layers)


def test_a_last_block_on_a_device_of_its_own():
    """Accelerate moves what a block gets, not what is computed beside it; "meta" stands for the second device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_llava()
    inputs = model.encode(PROMPTS, [picture(seed) for seed in range(3)], completions=TARGETS, close_turn=False)
    block = model.base.model.language_model.layers[-1].to("meta")
    model.base.model.language_model.norm.to("meta")
    model.base.lm_head.to("meta")
    for module in [block, *block.modules(), model.base.model.language_model.norm, model.base.lm_head]:
        if not hasattr(module, "_hf_hook"):
            add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
    with torch.no_grad(), only_last_positions(model.base, 2):
        assert model.forward(inputs, logits_to_keep=2).logits.shape[:2] == (3, 2)


def test_the_model_is_as_it_was_afterwards_even_behind_an_error():
    model = tiny_llava()
    block = model.base.model.language_model.layers[-1]
    placed = block.forward  # accelerate puts a forward of its own on the modules that it places
    block.forward = placed
    with pytest.raises(RuntimeError, match="on purpose"), only_last_positions(model.base, 2):
        assert block.forward is not placed
        raise RuntimeError("on purpose")
    assert block.__dict__["forward"] is placed
    tower = model.base.model.vision_tower.encoder.layers
    assert all("forward" not in layer.__dict__ for layer in [*tower, *model.base.model.language_model.layers[:-1]])


def test_the_loss_at_one_image_is_the_same_however_often_it_is_asked(model):
    """A key-value cache that is used twice grows, and the second loss is another one."""
    inputs, heads, targets = encoded(model)
    lean = LlavaNextTargets(model.base, heads, targets, (42, 84))
    with torch.no_grad():
        first = lean(inputs.pixel_values)
        assert all(torch.equal(lean(inputs.pixel_values), first) for _ in range(3))


def test_a_model_in_bfloat16_pulls_the_pixels_the_same_way(model):
    """Pixels stay float32, and nine in ten of their gradients keep their sign."""
    inputs, heads, targets = encoded(model)
    preprocess = LlavaNextPreprocessing(model.processor.image_processor, (42, 84))
    pixels = torch.stack([load_level(picture(seed)) for seed in range(3)])
    slopes = []
    for base in (model.base, copy.deepcopy(model.base).bfloat16()):
        lean = LlavaNextTargets(base, heads, targets, (42, 84))
        losses, slope = with_gradient(lambda values, lean=lean: lean(preprocess(values)), pixels)
        assert losses.dtype == slope.dtype == torch.float32
        slopes.append(slope)
    assert (slopes[0].sign() == slopes[1].sign()).float().mean() >= 0.9


def load_level(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_a_hijack_end_to_end_has_its_logged_loss_in_the_file(model, tmp_path, generator):
    inputs, heads, targets = encoded(model)
    lean = LlavaNextTargets(model.base, heads, targets, (42, 84))
    preprocess = LlavaNextPreprocessing(model.processor.image_processor, (42, 84))
    clean = torch.randint(0, 256, (3, 3, 42, 84), generator=generator) / 255
    result = pgd(lambda pixels: lean(preprocess(pixels)), clean, threat_model=Linf(32 / 255), steps=8)
    for row, image in enumerate(result.images):
        save_png(image, tmp_path / f"{row}.png")
        assert ((load_png(tmp_path / f"{row}.png") - clean[row]) * 255).abs().max().round() <= 32
    files = [Image.open(tmp_path / f"{row}.png") for row in range(3)]
    reread = model.processor.image_processor(files, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        judged = target_nll(model.forward(inputs, pixel_values=reread).logits, inputs.labels)
        before = target_nll(model.forward(inputs, pixel_values=preprocess(clean)).logits, inputs.labels)
    torch.testing.assert_close(judged, result.losses, atol=1e-4, rtol=0)
    assert (judged < before).all()


def test_one_image_against_all_targets(model, generator):
    _, heads, targets = encoded(model)
    lean = LlavaNextTargets(model.base, heads, targets, (42, 84))
    preprocess = LlavaNextPreprocessing(model.processor.image_processor, (42, 84))
    clean = torch.randint(0, 256, (3, 42, 84), generator=generator) / 255
    found = universal(lambda pixels: lean(preprocess(pixels)), clean, threat_model=Linf(32 / 255), steps=5)
    with torch.no_grad():
        assert found.losses.mean() < lean(preprocess(clean.unsqueeze(0))).mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda heads, targets: (heads, targets[:2]), "one non-empty row per prompt"),
        (lambda heads, targets: (heads, [targets[0], targets[1], targets[2][:0]]), "one non-empty row per prompt"),
        (lambda heads, targets: ([heads[0].flip(0), *heads[1:]], targets), "must agree up to the end"),
        (lambda heads, targets: ([row[:3] for row in heads], targets), "must agree up to the end"),
    ],
)
def test_chats_that_do_not_fit_together_are_refused(model, change, message):
    _, heads, targets = encoded(model)
    with pytest.raises(ValueError, match=message):
        LlavaNextTargets(model.base, *change(heads, targets), (42, 84))


def test_wrong_images_and_a_training_model_are_refused(model):
    inputs, heads, targets = encoded(model)
    with pytest.raises(ValueError, match="shape \\(1 or 3"):
        LlavaNextTargets(model.base, heads, targets, (42, 84))(inputs.pixel_values[:2])
    with pytest.raises(ValueError, match="image tokens"):
        LlavaNextTargets(model.base, heads, targets, (84, 42))(inputs.pixel_values)
    model.base.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            LlavaNextTargets(model.base, heads, targets, (42, 84))
    finally:
        model.base.eval()
