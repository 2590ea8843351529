import math

import pytest
import torch

from image_attacks import (
    BENIGN_TARGETS,
    cosine_distance,
    emitted,
    hidden_state_distance,
    logit_distillation,
    prefix_hinge,
    target_nll,
    target_reached,
)
from image_attacks.objectives import predicted_nll


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


@pytest.mark.parametrize("loss", [target_nll, prefix_hinge, target_reached, predicted_nll])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[-100, 2, 8]]), "must lie in 0 to 7, as the logits have 8 classes, or be -100 .* got 8, and 1 "),
        (torch.tensor([[-100, -1, -5]]), "must lie in 0 to 7, .* got -1, and 2 such"),
        (torch.tensor([[-100.0, 2.0, 3.0]]), "must be a tensor of whole numbers .* got a Tensor of torch.float32"),
        (torch.tensor([[False, True, True]]), "must be a tensor of whole numbers .* torch.bool"),
        ([[-100, 2, 3]], "must be a tensor of whole numbers .* got a list"),
        (torch.tensor([[-100, 2]]), r"must agree, got \(1, 3, 8\) and \(1, 2\)"),
    ],
)
def test_labels_that_are_no_token_ids_are_refused_by_name(loss, labels, message):
    name = "targets" if loss is predicted_nll else "labels"
    with pytest.raises(ValueError, match=f"`{name}`.* {message}"):
        loss(torch.zeros(1, 3, 8), labels)


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


def test_hinge_stops_at_tokens_that_are_forced_and_equals_the_nll_up_to_a_constant_elsewhere(generator):
    labels = torch.tensor([[-100, 1, 2]])
    forced = 20.0 * torch.nn.functional.one_hot(torch.tensor([[1, 0, 0]]), 4)
    forced[0, 1] = torch.tensor([0.0, 0.0, 0.0, 9.0])
    loss = prefix_hinge(forced, labels)
    expected = (torch.nn.functional.cross_entropy(forced[0, 1:2], labels[0, 2:]) + math.log(0.6)) / 2
    assert loss.item() == pytest.approx(expected.item())
    forced[0, 1] = torch.tensor([0.0, 0.0, 9.0, 0.0])
    assert prefix_hinge(forced, labels).item() == 0
    logits = torch.randn(1, 3, 4, generator=generator)
    assert torch.equal(prefix_hinge(logits, labels, 1.0), target_nll(logits, labels))
    with pytest.raises(ValueError, match="`probability`"):
        prefix_hinge(logits, labels, 0)


def test_a_target_is_reached_when_every_token_leads():
    labels = torch.tensor([[-100, 1, 2, -100], [-100, 1, 3, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 0], [1, 2, 0, 0]]), 4).float()
    assert target_reached(logits, labels).tolist() == [True, False]
    assert emitted(f"  {BENIGN_TARGETS[0].upper()} Yes.", BENIGN_TARGETS[0])
    assert not emitted("No. " + BENIGN_TARGETS[0], BENIGN_TARGETS[0]) and not emitted("anything", " ")


def test_distillation_is_the_divergence_from_teacher_to_student_over_masked_tokens(generator):
    student, teacher = torch.randn(2, 3, 4, 5, generator=generator)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    found = logit_distillation(student, teacher, mask)
    p, q = teacher.softmax(-1), student.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(found, (divergence * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(logit_distillation(teacher + 3, teacher, mask), torch.zeros(3))
    with pytest.raises(ValueError, match="rows \\[1\\]"):
        logit_distillation(student, teacher, mask * torch.tensor([[1], [0], [1]]))
    with pytest.raises(ValueError, match="must agree"):
        logit_distillation(student, teacher[:2], mask)


def test_cosine_distance_of_features(generator):
    features, goal = torch.randn(4, 6, generator=generator), torch.randn(1, 6, generator=generator).requires_grad_()
    found = cosine_distance(features, goal)
    torch.testing.assert_close(found, 1 - torch.cosine_similarity(features, goal))
    assert not found.requires_grad
    torch.testing.assert_close(cosine_distance(-2 * features, features), torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="must agree"):
        cosine_distance(features, features[:2])
