"""The counts that the benchmark prints."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mm_cb.training.planning.flops import FlopCount

ROOT = Path(__file__).parents[2]


def test_a_linear_layers_forward_and_backward_passes_count():
    layer, x = nn.Linear(3, 4, bias=False), torch.ones(5, 3)
    with FlopCount() as count:
        loss = layer(x).sum()
    assert count.total == 2 * 5 * 3 * 4
    with FlopCount() as count:
        loss.backward()
    assert count.total == 2 * 5 * 3 * 4  # the weight's; the input needs none


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_the_same_on_any_device(device):
    q, k, v = (torch.ones(1, 2, 7, 8, device=device) for _ in range(3))
    with FlopCount() as count, torch.no_grad():
        scaled_dot_product_attention(q, k, v, is_causal=True)
    assert count.total == 2 * 2 * (2 * 7 * 7 * 8)


@pytest.mark.slow
def test_a_text_step_at_7b_shapes_takes_a_seventh_of_the_official_work(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    import rr

    assert all(one["met"] for one in rr.count_goals(*rr.FLOP_GOALS[0]))
    assert rr.MEMORY_GOALS[0][1].tokens_per_pass == rr.plan().recipe.training.tokens_per_pass
    assert all(rr.memory_goal(*goal)["met"] for goal in rr.MEMORY_GOALS)
