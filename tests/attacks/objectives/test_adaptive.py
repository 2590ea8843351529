import math
from contextlib import nullcontext

import pytest
import torch

from image_attacks import hidden_state_distance, target_nll
from mm_cb.attacks.objectives import adaptive
from mm_cb.attacks.objectives.adaptive import late_weights, predicted_mean
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.objectives.teacher_student import Passes, adapter_in_language_tower
from mm_cb.attacks.saved import to_pixels
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from tests.tiny_llava import adapted_llava, picture

PICTURES = [picture(0), picture(1)]
BEHAVIORS = [
    Behavior("a", "what is in the picture", "a blue circle", None),
    Behavior("b", "please tell me how to brew tea", "it is red", None),
]
RESPONSES = ["a blue circle in the green square here", "it is red tea"]
BALANCED = [
    adaptive.MatchingObjective,
    adaptive.CleanTeacherObjective,
    adaptive.DistillObjective,
    adaptive.FluentObjective,
]
ALL = [*BALANCED, adaptive.LongTargetObjective, adaptive.ContinuationObjective]


@pytest.fixture(scope="module")
def subject():
    return Subject("rr", adapted_llava(), adapted=True)


@pytest.fixture(scope="module")
def pixels():
    return torch.stack([to_pixels(p) for p in PICTURES])


def build(kind, subject, **more):
    return kind(subject, BEHAVIORS, PICTURES, **{"responses": RESPONSES} | more)


def value_and_gradient(objective, pixels):
    pixels = pixels.clone().requires_grad_()
    losses = objective(pixels)
    return losses.detach(), torch.autograd.grad(losses.sum(), pixels)[0]


def two_whole_passes(objective, pixel_values):
    """The matching loss as it was before teacher and student shared anything."""
    model, inputs, keep = objective.subject.model, objective.forced.inputs, objective.forced.keep
    with torch.no_grad(), model.adapter(False):
        teacher = model.forward(inputs, pixel_values=pixel_values, logits_to_keep=1, hidden_states=True)
    student = model.forward(inputs, pixel_values=pixel_values, logits_to_keep=keep, hidden_states=True)
    states = [torch.stack([out.hidden_states[k][:, -keep:] for k in objective.layers]) for out in (student, teacher)]
    distance = hidden_state_distance(*states, objective.forced.mask)
    return target_nll(student.logits, objective.forced.target) + objective.weight * distance


@pytest.mark.parametrize("last_positions", [False, True])
def test_shared_and_stopped_passes_give_the_same_bits_as_two_whole_ones(subject, pixels, monkeypatch, last_positions):
    """Bits while every block runs whole; rounding, where the last block turns to the last positions alone."""
    objective = build(adaptive.MatchingObjective, subject)
    if not last_positions:
        monkeypatch.setattr(
            "mm_cb.attacks.objectives.teacher_student.only_last_positions", lambda model, count: nullcontext()
        )
    losses, gradient = value_and_gradient(objective, pixels)
    objective.loss = lambda values: two_whole_passes(objective, values)
    whole, whole_gradient = value_and_gradient(objective, pixels)
    if last_positions:
        torch.testing.assert_close(losses, whole)
        assert (gradient - whole_gradient).norm() <= 1e-5 * whole_gradient.norm()
    else:
        assert torch.equal(losses, whole) and torch.equal(gradient, whole_gradient)


@pytest.mark.parametrize("kind", ALL)
def test_no_pass_runs_the_last_block_where_nobody_looks(subject, pixels, kind):
    objective, rows = build(kind, subject), []
    hook = subject.model.decoder_blocks[-1].mlp.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    objective(pixels)
    hook.remove()
    assert rows and set(rows) == {objective.forced.keep}


def test_the_teacher_stops_behind_the_last_layer_asked_for_and_sees_the_same_there(subject, pixels):
    model, forced = subject.model, build(adaptive.MatchingObjective, subject).forced
    passes = Passes(subject, forced.inputs, forced.keep)
    embeds = passes.teacher_embeds(passes.student_embeds(forced.inputs.pixel_values), forced.inputs.pixel_values)
    with torch.no_grad(), model.adapter(False):
        whole = model.forward(forced.inputs, hidden_states=True).hidden_states
    ran = []
    hooks = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.decoder_blocks)]
    for layers, last in (([1], 0), ([2, 1], 1), ([3], 2), ([1, 3], 2)):
        ran.clear()
        found = passes.teacher_states(embeds, layers)
        assert torch.equal(found, torch.stack([whole[k][:, -forced.keep :] for k in layers]))
        assert max(ran) == last
    for hook in hooks:
        hook.remove()


def test_an_adapter_outside_the_language_tower_gets_a_teacher_of_its_own(pixels):
    subject = Subject("rr", adapted_llava("model.multi_modal_projector.linear_1"), adapted=True)
    assert not adapter_in_language_tower(subject.model)
    forced = build(adaptive.DistillObjective, subject)
    values = forced.forced.inputs.pixel_values
    embeds = forced.passes.student_embeds(values)
    with subject.model.adapter(False):
        reference = subject.model.embed(forced.forced.inputs, values)["inputs_embeds"]
    assert torch.equal(forced.passes.teacher_embeds(embeds, values)["inputs_embeds"], reference)
    assert not torch.equal(embeds["inputs_embeds"], reference)


@pytest.mark.parametrize("kind", BALANCED)
def test_without_weight_every_objective_is_the_target_loss(kind, subject, pixels):
    plain = TargetObjective(subject, BEHAVIORS, PICTURES)
    with torch.no_grad():
        assert torch.allclose(build(kind, subject, weight=0.0)(pixels), plain(pixels), atol=1e-5)


@pytest.mark.parametrize("kind", BALANCED)
def test_balanced_parts_pull_equally_hard_at_the_clean_picture(kind, subject, pixels):
    objective = build(kind, subject, weight=3.0)
    objective.balance(pixels)
    x = pixels.clone().requires_grad_()
    target, term = objective.terms(objective.preprocess(x))
    parts = [torch.autograd.grad(p.sum(), x, retain_graph=True)[0] for p in (target, objective.weight * term)]
    a, b = (part.flatten(1).norm(dim=1) for part in parts)
    free = objective.weight < 3 * adaptive.MOST_BALANCE
    assert torch.allclose(3 * a[free], b[free], rtol=1e-3) and (b <= 3.003 * a).all()
    assert free.any() or kind is adaptive.CleanTeacherObjective


def test_a_term_without_gradient_gets_no_weight(pixels):
    off = Subject("off", adapted_llava(), adapted=False)
    objective = build(adaptive.MatchingObjective, off)
    objective.balance(pixels)
    assert objective.weight.abs().max() == 0 and torch.isfinite(objective(pixels)).all()


@pytest.mark.parametrize("kind", [adaptive.MatchingObjective, adaptive.DistillObjective])
def test_distances_to_the_base_vanish_when_the_adapter_is_off(kind, pixels):
    off = Subject("off", adapted_llava(), adapted=False)
    objective = build(kind, off)
    _, term = objective.terms(objective.preprocess(pixels))
    assert term.abs().max() < 1e-5
    on = build(kind, Subject("on", off.model, adapted=True))
    assert (on.terms(on.preprocess(pixels))[1] > 1e-4).all()


def test_the_clean_teacher_is_the_complying_base_on_the_clean_picture(pixels):
    off = Subject("off", adapted_llava(), adapted=False)
    objective = build(adaptive.CleanTeacherObjective, off)
    assert objective.layer == 2  # 20/32 of three blocks
    assert objective.terms(objective.preprocess(pixels))[1].abs().max() < 1e-9
    assert (objective.terms(objective.preprocess((pixels + 0.2).clamp(0, 1)))[1] > 1e-6).all()


def test_divergence_and_surprise_equal_their_formulas(subject, pixels):
    distill, fluent = build(adaptive.DistillObjective, subject), build(adaptive.FluentObjective, subject)
    inputs, keep = distill.forced.inputs, distill.forced.keep
    values = distill.preprocess(pixels)
    with torch.no_grad():
        student = subject.model.forward(inputs, pixel_values=values).logits.double().log_softmax(-1)
        with subject.model.adapter(False):
            teacher = subject.model.forward(inputs, pixel_values=values).logits.double().log_softmax(-1)
            clean = subject.model.forward(inputs).logits.double().log_softmax(-1)
    for row in range(2):
        positions = [t - 1 for t in range(inputs.input_ids.shape[1]) if inputs.completion_mask[row, t]]
        p, q, c = (x[row, positions] for x in (teacher, student, clean))
        divergence = (p.exp() * (p - q)).sum(-1).mean()
        behind = int((distill.forced.target[row] != -100).sum())
        surprise = -(q.exp() * c).sum(-1)[behind:].mean()
        assert float(distill.terms(values)[1][row]) == pytest.approx(float(divergence), abs=1e-5)
        assert float(fluent.terms(values)[1][row]) == pytest.approx(float(surprise), abs=1e-5)
    assert keep == int(inputs.completion_mask.sum(1).max()) + 1


def test_long_targets_weigh_later_tokens_more(subject, pixels):
    objective = build(adaptive.LongTargetObjective, subject)
    inputs = objective.forced.inputs
    with torch.no_grad():
        logs = subject.model.forward(inputs, pixel_values=objective.preprocess(pixels)).logits.log_softmax(-1)
        losses = objective(pixels)
    for row in range(2):
        places = [t for t in range(inputs.input_ids.shape[1]) if inputs.completion_mask[row, t]]
        token_losses = [-float(logs[row, t - 1, inputs.input_ids[row, t]]) for t in places]
        weights = [1 + j / (len(places) - 1) for j in range(len(places))]
        expected = sum(w * v for w, v in zip(weights, token_losses, strict=True)) / sum(weights)
        assert float(losses[row]) == pytest.approx(expected, abs=1e-4)


def test_a_prefilled_answer_is_attacked_behind_the_prefill(subject):
    objective = build(adaptive.ContinuationObjective, subject, responses=[RESPONSES[0], "it is red"])
    counted = (objective._labels() != -100).sum(dim=1).tolist()
    assert counted == [5, 3]  # "in the green square here"; nothing behind the second target: itself


@pytest.mark.parametrize("kind", ALL)
def test_every_objective_can_be_attacked_and_leaves_no_gradient_behind(kind, subject, pixels):
    losses, gradient = value_and_gradient(build(kind, subject), pixels)
    assert losses.shape == (2,) and torch.isfinite(losses).all() and (gradient.flatten(1).abs().amax(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in subject.model.model.parameters())


@pytest.mark.parametrize("kind", ALL)
def test_objective_rows_do_not_mix(kind, subject, pixels):
    together = build(kind, subject)(pixels)
    alone = kind(subject, BEHAVIORS[1:], PICTURES[1:], responses=RESPONSES[1:])(pixels[1:])
    assert float(together[1]) == pytest.approx(
        float(alone[0]), abs=1e-4, rel=1e-5
    )  # the clean teacher's is in thousands


def test_weights_and_means_by_hand():
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, -100, 5]])
    assert late_weights(labels).tolist() == [[0, 1, 1.5, 2], [0, 0, 0, 1]]
    values = torch.tensor([[1.0, 2.0, 3.0, math.nan], [1.0, 2.0, 3.0, math.nan]])
    assert predicted_mean(values, labels).tolist() == [2.0, 3.0]
