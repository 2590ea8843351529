"""Between a base and its breaker: laws for a LoRA on every linear layer, and for the checkpoint it is merged into."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mm_cb.core.errors import UserError
from mm_cb.models.dial import WeightDifference
from mm_cb.models.merging import fold
from tests.models.tiny import KINDS, tiny
from tests.tiny_llava import picture

EVERY_WAY = ("llava_next", "llava", "qwen2_5_vl")
EXACT = [
    *((kind, way, torch.float32) for kind in EVERY_WAY for way in ("lora", "merged")),
    *((kind, "lora", torch.float32) for kind in KINDS if kind not in EVERY_WAY),
]
ROUNDED = [(kind, way, torch.bfloat16) for kind in EVERY_WAY for way in ("lora", "merged")]


PICTURES_IN_A_ROW = ("mistral3", "pixtral")
"""Their image towers see the pictures of all chats as one sequence."""


def with_lora(kind, dtype, tower_too=None):
    """A random LoRA on all linear layers, those of the image tower too where a picture is a row of its own there."""
    model = tiny(kind)
    tower_too = kind not in PICTURES_IN_A_ROW if tower_too is None else tower_too
    linear = [name for name, part in model.model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    paths = [name for name in linear if tower_too or "language_model" in name]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=paths, init_lora_weights=False)
    model.model = get_peft_model(model.model, config).to(dtype).eval().requires_grad_(False)
    return model


@cache
def between(kind, way, dtype):
    """A breaker that can be turned down, itself for comparison, and its base."""
    base, breaker, shipped = tiny(kind), with_lora(kind, dtype), with_lora(kind, dtype)
    base.model.to(dtype)
    if way == "merged":
        breaker.model, shipped.model = fold(breaker.model)[0], fold(shipped.model)[0]
        breaker.difference = WeightDifference(breaker.base, base.base, "breaker", "base")
    return breaker, shipped, base


@pytest.fixture(scope="module", params=[*EXACT, *ROUNDED], ids=str)
def three(request):
    return between(*request.param)


@pytest.fixture(scope="module", params=EXACT, ids=str)
def exact(request):
    return between(*request.param)


@pytest.fixture(scope="module", params=[way for way in EXACT if way[0] in EVERY_WAY], ids=str)
def every_way(request):
    return between(*request.param)


def asked(model):
    return model.encode(["what is it", "tell me how to brew a red tea"], [picture(0, (70, 48)), picture(1, (70, 48))])


@torch.no_grad()
def logits(model):
    return model.forward(asked(model)).logits


def test_the_ends_are_base_and_breaker_to_the_last_bit_and_nothing_stays_behind(three):
    breaker, shipped, base = three
    whole, plain = logits(shipped), logits(base)
    assert not torch.allclose(whole.float(), plain.float(), atol=1e-2)
    for scale, expected in ((1.0, whole), (0.0, plain), (torch.ones(2), whole), (torch.zeros(2), plain)):
        with breaker.adapter_scaled(scale):
            assert torch.equal(logits(breaker), expected)
    with breaker.adapter(False):
        assert torch.equal(logits(breaker), plain)
    for scale in (0.5, torch.tensor([0.2, 0.9])):
        with pytest.raises(KeyboardInterrupt), breaker.adapter_scaled(scale):
            with breaker.adapter(False):
                assert torch.equal(logits(breaker), plain)
            half = logits(breaker)
            raise KeyboardInterrupt
        assert not torch.equal(half, whole) and not torch.equal(half, plain)
        assert torch.equal(logits(breaker), whole)


def test_every_row_has_its_own_scale_forth_and_back(exact):
    breaker = exact[0]
    inputs, scales = asked(breaker), torch.tensor([0.3, 0.8])

    def run(scale):
        pixels = inputs.pixel_values.clone().requires_grad_()
        with breaker.adapter_scaled(scale):
            made = breaker.forward(inputs, pixel_values=pixels).logits
        values = made[:, -1].logsumexp(-1)  # walked back outside, as attacks do
        return made.detach(), torch.autograd.grad(values.sum(), pixels)[0].reshape(2, -1)

    rows, slopes = run(scales)
    for i, scale in enumerate(scales.tolist()):
        alone, slope = run(scale)
        torch.testing.assert_close(rows[i], alone[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slopes[i], slope[i], rtol=1e-3, atol=1e-5)


def test_a_scaled_pass_costs_the_flops_of_a_pass(every_way):
    breaker = every_way[0]
    inputs = asked(breaker)

    def count(scale):
        pixels = inputs.pixel_values.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter, breaker.adapter_scaled(scale):
            torch.autograd.grad(breaker.forward(inputs, pixel_values=1 * pixels).logits.sum(), pixels)
        return counter.get_total_flops()

    assert count(torch.tensor([0.3, 0.8])) == count(0.5) == count(1.0) > 0


def test_in_between_the_weights_are(exact):
    breaker, shipped, base = exact
    with breaker.adapter_scaled(0.3):
        found = logits(breaker)
    folded = shipped.base if breaker.difference else fold(shipped.model)[0]
    kept = [weight.clone() for weight in base.base.parameters()]
    for mixed, weight in zip(base.base.parameters(), folded.parameters(), strict=True):
        mixed.data.lerp_(weight, 0.3)
    torch.testing.assert_close(found, logits(base), rtol=1e-3, atol=1e-3)  # Gemma 4 makes 3e-4 of rounding
    for mixed, weight in zip(base.base.parameters(), kept, strict=True):
        mixed.data.copy_(weight)


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan"), torch.tensor([0.5, 1.1]), torch.zeros(2, 2)])
def test_a_scale_outside_of_base_and_breaker_is_refused(exact, scale):
    with pytest.raises(UserError, match=r"from 0|0 \(the base\) to 1"), exact[0].adapter_scaled(scale):
        pass


def test_what_is_no_base_of_the_model_is_refused():
    model = tiny("llava")
    with pytest.raises(UserError, match="the same weights"):
        WeightDifference(model.base, tiny("llava").base, "breaker", "base")
    with pytest.raises(UserError, match=r"`--base wide` must be the model that `breaker` was made from, but at `.*`"):
        WeightDifference(model.base, tiny("llava", intermediate_size=48).base, "breaker", "wide")
    with pytest.raises(UserError, match="nothing"):
        WeightDifference(model.base, tiny("llava", num_hidden_layers=2).base, "breaker", "short")


def test_rows_of_their_own_are_for_linear_layers_alone():
    model, base = tiny("llava"), tiny("llava")
    model.final_norm.weight.data += 0.1
    model.difference = WeightDifference(model.base, base.base, "breaker", "base")
    with model.adapter_scaled(0.0):
        assert torch.equal(logits(model), logits(base))
    with pytest.raises(UserError, match="--anneal steps"), model.adapter_scaled(torch.tensor([0.1, 0.2])):
        pass
    with model.adapter_scaled(1.0):
        assert not torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("kind", PICTURES_IN_A_ROW)
def test_an_image_tower_that_sees_all_pictures_as_one_row_is_not_dialled_row_by_row(kind):
    breaker = with_lora(kind, torch.float32, tower_too=True)
    with pytest.raises(UserError, match="--anneal steps"), breaker.adapter_scaled(torch.tensor([0.3, 0.8])):
        logits(breaker)
    with breaker.adapter_scaled(0.0):
        assert torch.equal(logits(breaker), logits(tiny(kind)))


def test_a_merged_lora_has_no_scale():
    model = with_lora("llava", torch.float32)
    model.model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"), model.adapter_scaled(0.5):
        pass
