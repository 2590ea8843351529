"""Flash attention of rows laid end to end, in one call: a plain kernel stands for flash-attn's, which needs a GPU."""

import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from mm_cb import RRConfig, RRTrainer
from mm_cb.training.hidden_states import _row_attention, _varlen_attention, hidden_states, lay_out, use_row_attention
from mm_cb.training.recompute import recompute_blocks
from tests.models import laws
from tests.models.tiny import KINDS, tiny
from tests.training.test_hidden_states import BLOCKS, FIRST, adapted_model, batch

CLOSE = 1e-4
"""In float32: rounding makes 1e-5 at most, a softmax scale that is 2 % too large 4e-2 and more."""


class Kernel:
    """What flash attention's kernel for rows of several lengths computes, and what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert q.dtype == k.dtype == v.dtype and q.shape[2:] == k.shape[2:] == v.shape[2:]
        assert options.pop("causal")
        ends = cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
        assert ends[-1] == len(q) == len(k) and max(lengths) == max_seqlen_q == max_seqlen_k
        self.calls.append(SimpleNamespace(ends=ends, dtype=q.dtype, **options))
        rows = [self.row(*row, **options) for row in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
        return torch.cat(rows).to(q.dtype)

    @staticmethod
    def row(q, k, v, *, softmax_scale, window_size, softcap=0.0):
        """One row, each ``(T, heads, D)``, in float32."""
        k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        scores = torch.einsum("ihd,jhd->hij", q.float(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(len(q))
        back, (left, right) = places[:, None] - places, window_size
        assert right in (-1, 0)
        hidden = (back < 0) if left < 0 else (back < 0) | (back > left)
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=made))
    return made


def states_and_gradients(model, inputs, mask, first=FIRST, last=BLOCKS):
    """States at the counted tokens, and the gradients of the LoRA."""
    rows = lay_out(model, inputs, mask)
    states = hidden_states(model, rows, first, last)
    kept = slice(None) if rows.counted is None else rows.counted
    made = [*states.reference[:-1], *states.adapted[:-1], states.reference[-1][kept], states.adapted[-1][kept]]
    weights = [weight for name, weight in sorted(model.model.named_parameters()) if "lora_" in name]
    torch.manual_seed(0)
    loss = sum((state * torch.randn_like(state)).sum() for state in made if state.requires_grad)
    return [state.detach() for state in (*made, *torch.autograd.grad(loss, weights))]


def furthest(made, expected):
    """The largest distance between two tensors of the same place, in parts of their length."""
    assert all(other.any() for other in expected)
    return max(float((one - other).norm() / other.norm()) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("counted", ["attention_mask", "completion_mask"])
def test_states_and_gradients_are_those_of_row_by_row(randomise_b, kernel, window, counted, recompute):
    model = adapted_model(randomise_b)
    for block in model.decoder_blocks:
        block.self_attn.config.sliding_window = window
    if recompute:
        recompute_blocks(model)
    inputs = batch(model)
    mask = getattr(inputs, counted)
    expected = states_and_gradients(model, inputs, mask)
    assert not kernel.calls
    use_row_attention(model, "flash_attention_2")
    assert furthest(states_and_gradients(model, inputs, mask), expected) < CLOSE
    lengths = inputs.attention_mask.sum(-1)
    ends, passes = [0, *lengths.cumsum(0).tolist()], BLOCKS + (BLOCKS - FIRST)
    assert len(kernel.calls) == passes + recompute * (BLOCKS - FIRST)  # once a block, not once a row
    assert all(call.ends == ends and call.softmax_scale == 8**-0.5 for call in kernel.calls)
    assert all(call.window_size == ((-1, -1) if window is None else (window - 1, 0)) for call in kernel.calls)


def test_in_bfloat16_the_kernel_gets_bfloat16_whatever_the_adapter_is_in(randomise_b, kernel):
    model = adapted_model(randomise_b)
    model.base.to(torch.bfloat16)
    for name, weight in model.model.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data
    use_row_attention(model, "flash_attention_2")
    inputs = batch(model)
    states_and_gradients(model, inputs, inputs.attention_mask)
    assert {call.dtype for call in kernel.calls} == {torch.bfloat16}


def test_padded_passes_stay_what_they_are(randomise_b, kernel):
    model = adapted_model(randomise_b)
    inputs = batch(model)
    expected = model.forward(inputs).logits
    use_row_attention(model, "flash_attention_2")
    assert torch.equal(model.forward(inputs).logits, expected) and not kernel.calls


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_the_same_states_and_gradients(kind, pictures, kernel):
    """Gemma 3's pictures see themselves in every block: those rows are never the kernel's, its texts are."""
    model = laws.with_adapter(tiny(kind))[0]
    texts = ["what is in the picture", "tell me"]
    images = [laws.picture(), None] if pictures else [None, None]
    inputs = model.encode(texts, images, completions=["a red blue circle", "tea"])
    run = partial(states_and_gradients, model, inputs, inputs.attention_mask, laws.FIRST, len(model.decoder_blocks))
    expected = run()
    use_row_attention(model, "flash_attention_2")
    assert furthest(run(), expected) < CLOSE
    attending = [hasattr(block, "self_attn") for block in model.decoder_blocks]
    expected_calls = 0 if kind == "gemma3" and pictures else sum(attending) + sum(attending[laws.FIRST :])
    assert len(kernel.calls) == expected_calls


def test_rows_longer_than_gemmas_window_are_the_kernels_in_blocks_without_one(kernel):
    model = laws.with_adapter(tiny("gemma3", sliding_window=3))[0]
    inputs = model.encode(["what is in the picture"], [None], completions=["a red blue circle"])
    run = partial(states_and_gradients, model, inputs, inputs.attention_mask, laws.FIRST, len(model.decoder_blocks))
    expected = run()
    use_row_attention(model, "flash_attention_2")
    assert furthest(run(), expected) < CLOSE
    full = [kind == "full_attention" for kind in model.layer_types]
    assert 0 < len(kernel.calls) == sum(full) + sum(full[laws.FIRST :]) < len(full)


def attended(**given):
    made = torch.randn(3, 1, 2, 5, given.pop("head", 8), generator=torch.Generator().manual_seed(0))
    module = SimpleNamespace(is_causal=True)
    return _varlen_attention(module, *made, None, row_lengths=(2, 3), scaling=0.3, **given)[0]


def test_what_the_kernel_cannot_take_goes_row_by_row_and_what_a_module_says_is_passed_on(kernel):
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    both_ways = attended(row_masks=(None, mask))
    assert attended(head=264).shape == (1, 5, 2, 264) and not kernel.calls
    causal = attended(row_masks=(None, None))
    torch.testing.assert_close(causal[:, :2], both_ways[:, :2])
    assert not torch.allclose(causal[:, 2:], both_ways[:, 2:], atol=1e-2)
    assert not torch.allclose(attended(softcap=0.1), causal, atol=1e-2)
    assert [call.softmax_scale for call in kernel.calls] == [0.3, 0.3]
    assert [getattr(call, "softcap", None) for call in kernel.calls] == [None, 0.1]


SHORT = {"target_layers": [2], "max_steps": 2, "batch_size": 2, "held_out": 0}


def test_rr_trainer_attends_as_it_is_told(examples, model_folder, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_cb.training.rr_trainer.refuse_attention", lambda *asked: None)
    rows = [{"messages": list(e.messages), "images": list(e.images), "set": e.set} for e in examples]
    losses = {}
    for attention in ("sdpa", "flash_attention_2"):
        args = RRConfig(output_dir=tmp_path / attention, attention=attention, device="cpu", **SHORT)
        trainer = RRTrainer(str(model_folder), args, rows, peft_config=LoraConfig(r=4, layers_to_transform=[0, 1]))
        assert not kernel.calls
        trainer.train()
        losses[attention] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert kernel.calls and losses["sdpa"]
    assert losses["flash_attention_2"] == pytest.approx(losses["sdpa"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs a GPU, flash-attn")
@pytest.mark.parametrize("window", [None, 64])
def test_on_a_gpu_attention_in_bfloat16_is_sdpas_to_a_thousandth(window, device="cuda"):
    """As near to float32, that is: two kernels in bfloat16 round otherwise, by more than a thousandth of a number."""
    lengths, module = (300, 1, 77, 512), SimpleNamespace(is_causal=True, num_key_value_groups=4)
    generator = torch.Generator().manual_seed(0)
    heads = (8, 2, 2)  # of queries, keys and values
    inputs = [torch.randn(1, count, sum(lengths), 64, generator=generator).bfloat16().to(device) for count in heads]
    weight = torch.randn(1, sum(lengths), 8, 64, generator=generator).bfloat16().to(device)

    def run(attend, dtype):
        given = [states.to(dtype).requires_grad_() for states in inputs]
        output = attend(module, *given, None, row_lengths=lengths, scaling=0.125, sliding_window=window)[0]
        made = output, *torch.autograd.grad((output * weight).sum(), given)
        return [states.detach().float() for states in made]

    exact = run(_row_attention, torch.float32)
    for ours, plain, right in zip(
        run(_varlen_attention, torch.bfloat16), run(_row_attention, torch.bfloat16), exact, strict=True
    ):
        assert furthest([ours], [right]) <= furthest([plain], [right]) + 1e-3
