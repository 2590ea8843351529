import math

import pytest
import torch

from image_attacks import hidden_state_distance, target_nll


def test_target_nll_is_the_mean_over_the_target_of_minus_log_probability_of_the_next_token(generator):
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[-100, -100, 3, 6, -100], [-100, 2, -100, -100, 0]])
    log_p = logits.log_softmax(-1)
    expected = [-(log_p[0, 1, 3] + log_p[0, 2, 6]) / 2, -(log_p[1, 0, 2] + log_p[1, 3, 0]) / 2]
    torch.testing.assert_close(target_nll(logits, labels), torch.stack(expected))


def test_target_nll_of_uniform_logits_is_log_of_the_vocabulary():
    assert target_nll(torch.zeros(1, 3, 8), torch.tensor([[-100, 1, 2]])).item() == pytest.approx(math.log(8))


def test_target_nll_is_zero_when_greedy_decoding_emits_the_target():
    labels = torch.tensor([[-100, 1, 2]])
    logits = 100.0 * torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 4)
    assert target_nll(logits, labels).item() == pytest.approx(0, abs=1e-6)


def test_target_nll_computes_in_float32(generator):
    logits = torch.randn(1, 4, 9, generator=generator).bfloat16()
    labels = torch.tensor([[-100, 1, 2, 3]])
    assert target_nll(logits, labels).dtype == torch.float32
    assert torch.equal(target_nll(logits, labels), target_nll(logits.float(), labels))


def test_target_nll_ignores_what_is_not_target(generator):
    logits, labels = torch.randn(1, 4, 9, generator=generator), torch.tensor([[-100, -100, 5, -100]])
    changed = logits.clone()
    changed[:, [0, 2, 3]] = 50
    assert torch.equal(target_nll(logits, labels), target_nll(changed, labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [([[-100, -100, -100]], "rows \\[0\\]"), ([[1, 2, 3]], "first position"), ([[-100, 2]], "must agree")],
)
def test_target_nll_refuses_labels_that_cannot_be_scored(labels, message):
    with pytest.raises(ValueError, match=message):
        target_nll(torch.zeros(1, 3, 8), torch.tensor(labels))


def test_distance_is_zero_for_equal_one_for_orthogonal_two_for_opposite_states_whatever_their_scale():
    one = torch.tensor([1.0, 0.0]).expand(2, 1, 3, 2)
    other = torch.tensor([0.0, 1.0]).expand(2, 1, 3, 2)
    mask = torch.ones(1, 3)
    for teacher, expected in ((5 * one, 0), (other, 1), (-0.1 * one, 2)):
        assert hidden_state_distance(one, teacher, mask).item() == pytest.approx(expected, abs=1e-6)


def test_distance_counts_masked_tokens_only_and_each_example_alone(generator):
    student, teacher = torch.randn(2, 3, 2, 4, 5, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])
    found = hidden_state_distance(student, teacher, mask)
    cosine = torch.cosine_similarity(student, teacher, dim=-1)
    expected = torch.stack([1 - cosine[:, 0, :2].mean(), 1 - cosine[:, 1, 3].mean()])
    torch.testing.assert_close(found, expected)


def test_distance_gives_no_gradient_to_the_teacher(generator):
    student, teacher = torch.randn(2, 3, 2, 4, 5, generator=generator).requires_grad_().unbind()
    loss = hidden_state_distance(student, teacher, torch.ones(2, 4)).sum()
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


def test_distance_refuses_an_empty_mask_and_other_shapes():
    states = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="rows \\[1\\]"):
        hidden_state_distance(states, states, torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="must agree"):
        hidden_state_distance(states, states[..., :2], torch.ones(2, 3))
