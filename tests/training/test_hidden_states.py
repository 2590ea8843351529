import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm_cb.training.adapter import add_adapter
from mm_cb.training.hidden_states import (
    adapted_states,
    hidden_states,
    lay_out,
    reference_states,
    target_states,
    use_row_attention,
)
from mm_cb.training.placement import KeptBlocks, lora_paths
from tests.tiny_llava import picture, tiny_llava

FIRST, BLOCKS = 1, 3


def adapted_model(randomise_b, *, dropout=0.0, kept=BLOCKS):
    model = tiny_llava(blocks=BLOCKS)
    paths = lora_paths(model, range(FIRST, BLOCKS), ["q_proj", "v_proj", "down_proj"])
    model = add_adapter(model, paths, KeptBlocks(kept, True), r=4, lora_alpha=4, dropout=dropout)
    randomise_b(model.model)
    use_row_attention(model)
    return model


@pytest.fixture
def model(randomise_b):
    return adapted_model(randomise_b)


def batch(model, side="right"):
    """Rows of very different lengths, with and without a picture."""
    texts = ["what", "tell me how to brew tea", "is it a red circle", "here"]
    images = [picture(0), None, picture(1, (42, 84)), None]
    return model.encode(texts, images, completions=["no", "i can not", "a blue square", "tea"], padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_two_plain_padded_passes(model, side):
    inputs = batch(model, side)
    states = hidden_states(model, lay_out(model, inputs, inputs.attention_mask), FIRST, BLOCKS)
    plain = tiny_llava(blocks=BLOCKS).forward(inputs, hidden_states=True).hidden_states
    adapted = model.forward(inputs, hidden_states=True).hidden_states
    real = inputs.attention_mask.bool()
    for i, layer in enumerate(range(FIRST + 1, BLOCKS + 1)):  # the last one is behind the final norm in both
        torch.testing.assert_close(states.reference[i], plain[layer][real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states.adapted[i], adapted[layer][real], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(states.reference[i], states.adapted[i], atol=1e-3)
        assert states.adapted[i].requires_grad and not states.reference[i].requires_grad


class Waits(TorchDispatchMode):
    """Refuses what a GPU's host waits for: a number read from the device, or a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, func
        return func(*args, **(kwargs or {}))


def test_rows_of_known_lengths_are_laid_out_without_waiting_for_the_device(model, monkeypatch):
    texts = ["what", "tell me how to brew tea", "here"]
    inputs = model.encode(texts, [None] * 3, completions=["no", "i can not", "tea"])
    plain, counted = lay_out(model, inputs, inputs.completion_mask), inputs.completion_mask.sum(-1).tolist()
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    with pytest.raises(AssertionError), Waits():
        inputs.input_ids[inputs.attention_mask.bool()]
    with Waits():
        rows = lay_out(model, inputs, inputs.completion_mask, plain.lengths, counted)
    assert rows.lengths == plain.lengths and all(map(torch.equal, (rows.embeds, rows.mask), (plain.embeds, plain.mask)))


def test_each_half_alone_is_that_of_both_and_the_adapted_one_has_a_gradient_at_the_embeddings(model):
    inputs, targets = batch(model), (FIRST + 1, BLOCKS)
    rows = lay_out(model, inputs, inputs.attention_mask)
    adapted, reference = target_states(model, rows, FIRST, targets)
    assert torch.equal(reference_states(model, rows, FIRST, targets), reference)
    embeds = rows.embeds.clone().requires_grad_(True)
    alone = adapted_states(model, rows._replace(embeds=embeds), FIRST, targets)
    torch.testing.assert_close(alone, adapted)
    (gradient,) = torch.autograd.grad(alone.sum(), embeds)
    assert (gradient.abs().sum(-1) > 0).all()


def test_rows_do_not_see_each_other(model):
    inputs = batch(model)
    states = hidden_states(model, lay_out(model, inputs, inputs.attention_mask), FIRST, 2)
    start = 0
    for row, length in enumerate(inputs.attention_mask.sum(-1).tolist()):
        alone = inputs.rows(row, row + 1)
        own = hidden_states(model, lay_out(model, alone, alone.attention_mask), FIRST, 2)
        torch.testing.assert_close(own.adapted[0], states.adapted[0][start : start + length], rtol=1e-4, atol=1e-5)
        start += length


def test_nothing_above_the_last_state_is_run_and_what_lies_below_the_adapter_only_once(model):
    calls = []
    for index, block in enumerate(model.decoder_blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    model.base.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    inputs = batch(model)
    hidden_states(model, lay_out(model, inputs, inputs.attention_mask), FIRST, 2)
    assert calls == ["tower", 0, 1, 1]


def test_gradients_stop_at_the_first_adapted_block_even_where_embeddings_require_them(model):
    model.base.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    inputs = model.encode(["what", "here"], [None, None], completions=["no", "tea"], padding_side="right")
    assert model.embed(inputs)["inputs_embeds"].requires_grad
    below = []
    model.decoder_blocks[FIRST - 1].register_forward_hook(lambda module, args, out: below.append(out.requires_grad))
    hidden_states(model, lay_out(model, inputs, inputs.attention_mask), FIRST, 2).adapted[0].sum().backward()
    assert below == [False]


def test_only_the_adapters_dropout_is_active_and_only_in_the_adapted_pass(randomise_b):
    model = adapted_model(randomise_b, dropout=0.5)
    model.model.train()
    inputs = batch(model)
    rows = lay_out(model, inputs, inputs.attention_mask)
    first, second = (hidden_states(model, rows, FIRST, 2) for _ in range(2))
    assert torch.equal(first.reference[0], second.reference[0])
    assert not torch.equal(first.adapted[0], second.adapted[0])
    active = {name for name, module in model.model.named_modules() if module.training}
    assert active and all("lora_dropout" in name for name in active)
    alone, again = (adapted_states(model, rows, FIRST, (FIRST + 1,)) for _ in range(2))  # the adversary's passes
    assert torch.equal(alone, again)


def test_rows_longer_than_the_sliding_window_look_back_no_further(model):
    plain = tiny_llava(blocks=BLOCKS)
    for one in (model, plain):
        one.base.config.text_config.sliding_window = one.base.model.language_model.config.sliding_window = 4
        for block in one.decoder_blocks:
            block.self_attn.config.sliding_window = 4
    inputs = batch(model)
    states = hidden_states(model, lay_out(model, inputs, inputs.attention_mask), FIRST, 2)
    expected = plain.forward(inputs, hidden_states=True).hidden_states[2][inputs.attention_mask.bool()]
    torch.testing.assert_close(states.reference[0], expected, rtol=1e-4, atol=1e-5)


def test_a_part_of_a_batch_keeps_its_own_pictures(model):
    inputs = batch(model)
    whole = model.embed(inputs)["inputs_embeds"]
    for start, stop in [(0, 2), (1, 2), (1, 4), (3, 4)]:
        torch.testing.assert_close(model.embed(inputs.rows(start, stop))["inputs_embeds"], whole[start:stop])
