"""What the last positions alone say equals what the whole model says there."""

import pytest
import torch

from mm_cb.models.last_positions import only_last_positions
from tests.tiny_llava import picture, tiny_llava

PROMPTS = ["what is in the picture", "tell me how to brew tea", "what is a red square"]
TARGETS = ["a red circle", "no i can not", "it"]


def with_gradient(function, pixel_values):
    pixel_values = pixel_values.clone().requires_grad_()
    losses = function(pixel_values)
    return losses.detach(), torch.autograd.grad(losses.sum(), pixel_values)[0]


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
    """Keys without positions, say: what cannot be computed apart is left to the model."""
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
