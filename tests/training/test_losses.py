import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_cb.training.losses import (
    length_loss,
    reroute_coeff,
    reroute_loss,
    retain_coeff,
    retain_loss,
    retain_positions,
)


def states(seed=0, layers=2, rows=3, tokens=5, hidden=8):
    return torch.randn(layers, rows, tokens, hidden, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


@given(st.integers(1, 500), st.floats(0.1, 100), st.data())
def test_the_weights_add_up_to_alpha_and_move_from_one_side_to_the_middle(total, alpha, data):
    step = data.draw(st.integers(0, total - 1))
    assert retain_coeff(0, total, alpha) == 0
    assert reroute_coeff(0, total, alpha) == alpha
    assert reroute_coeff(step, total, alpha) + retain_coeff(step, total, alpha) == pytest.approx(alpha)
    assert retain_coeff(step, total, alpha) == pytest.approx(alpha * step / (2 * total))
    assert 0 <= retain_coeff(step, total, alpha) < alpha / 2 < reroute_coeff(step, total, alpha) or step == 0


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_steps_outside_the_run_are_refused(step):
    with pytest.raises(ValueError, match=r"0\.\.9"):
        reroute_coeff(step, 10, 5.0)


def test_identical_states_reroute_one_retain_zero_with_zero_gradients():
    adapted = states().requires_grad_()
    assert reroute_loss(adapted, states(), MASK).item() == pytest.approx(1, abs=1e-6)
    loss = retain_loss(adapted, states(), MASK)
    loss.backward()
    assert loss.item() == 0 and torch.equal(adapted.grad, torch.zeros_like(adapted))
    adapted.grad = None
    reroute_loss(adapted, states(), MASK).backward()
    assert adapted.grad.isfinite().all() and adapted.grad.abs().max() < 1e-6


def test_reroute_ignores_scale_and_stops_at_right_angles():
    adapted, reference = states(1), states(2)
    scaled = reroute_loss(adapted * 7, reference * 0.1, MASK)
    assert scaled.item() == pytest.approx(reroute_loss(adapted, reference, MASK).item(), rel=1e-5)
    assert reroute_loss(-reference, reference, MASK).item() == 0


def test_length_sees_nothing_but_length():
    reference = states(2)
    assert length_loss(-reference, reference, MASK).item() == pytest.approx(0, abs=1e-10)
    for factor in (5.0, 0.2):  # as much for longer as for shorter
        assert length_loss(factor * reference, reference, MASK).item() == pytest.approx(math.log(5) ** 2, rel=1e-4)
    adapted = states(2).requires_grad_()
    length_loss(adapted, reference, MASK).backward()
    assert adapted.grad.abs().max() < 1e-6


def test_the_values_by_hand():
    reference = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
    adapted = torch.tensor([[[[1.0, 1.0], [0.0, 5.0], [-4.0, 0.0]]]])
    mask = torch.tensor([[1, 1, 1]])
    assert reroute_loss(adapted, reference, mask).item() == pytest.approx(2**-0.5 / 3)
    assert retain_loss(adapted, reference, mask).item() == pytest.approx((1 + 26**0.5 + 5) / 3)


@pytest.mark.parametrize("loss", [reroute_loss, retain_loss, length_loss])
def test_tokens_outside_the_mask_change_nothing_not_even_as_nan(loss):
    adapted, reference = states(1), states(2)
    expected = loss(adapted, reference, MASK)
    spoilt = adapted.masked_fill(MASK[None, :, :, None] == 0, float("nan")).requires_grad_()
    result = loss(spoilt, reference, MASK)
    result.backward()
    assert torch.equal(result, expected) and spoilt.grad.isfinite().all()
    wider = torch.nn.functional.pad(MASK, (0, 3))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (adapted, reference)]
    assert torch.equal(loss(*padded, wider), expected)


def test_the_official_average_counts_padding():
    adapted, reference = states(1), states(2)
    tokens, official = (retain_loss(adapted, reference, MASK, average=name) for name in ("tokens", "official"))
    assert retain_positions(MASK, "tokens") == 10 and retain_positions(MASK, "official") == 15
    assert official.item() == pytest.approx(tokens.item() * 10 / 15)


@pytest.mark.parametrize("average", ["tokens", "official"])
def test_the_parts_of_a_split_batch_add_up(average):
    adapted, reference = states(1), states(2)
    count = retain_positions(MASK, average)
    rows = [slice(0, 1), slice(1, 3)]
    parts = [retain_loss(adapted[:, r], reference[:, r], MASK[r], average=average, count=count) for r in rows]
    assert sum(parts).item() == pytest.approx(retain_loss(adapted, reference, MASK, average=average).item())
    for loss in (reroute_loss, length_loss):
        parts = [loss(adapted[:, r], reference[:, r], MASK[r], count=MASK.sum()) for r in rows]
        assert sum(parts).item() == pytest.approx(loss(adapted, reference, MASK).item())


def test_half_precision_states_are_averaged_in_float32():
    adapted, reference = states(1).bfloat16(), states(2).bfloat16()
    for loss in (reroute_loss, retain_loss, length_loss):
        result = loss(adapted, reference, MASK)
        assert result.dtype == torch.float32
        assert result.item() == pytest.approx(loss(adapted.float(), reference.float(), MASK).item(), rel=1e-2)


def test_wrong_shapes_and_empty_masks_are_refused():
    with pytest.raises(ValueError, match=r"\(L, \.\.\., H\)"):
        reroute_loss(states(), states(layers=1), MASK)
    with pytest.raises(ValueError, match=r"\(L, \.\.\., H\)"):
        retain_loss(states(), states(), MASK.T)
    with pytest.raises(ValueError, match="at least one token"):
        retain_loss(states(), states(), torch.zeros_like(MASK))
