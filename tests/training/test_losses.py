import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mm_cb.core.errors import UserError
from mm_cb.training.contrast import repbend_loss, triplet_loss
from mm_cb.training.losses import (
    RELATIVE_LENGTH,
    draw_directions,
    kl_retain_loss,
    length_loss,
    rand_c_loss,
    rand_p_loss,
    reroute_coeff,
    reroute_loss,
    retain_coeff,
    retain_loss,
    retain_positions,
    rmu_loss,
)
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.registry import LossEntry, Setting, full_settings, loss_entry, loss_names, register_loss
from mm_cb.training.run import train
from tests.reference.released_trainer import released_retain_loss
from tests.training.test_run import OPTIONS, Stop, StoppingProgress, adapter_bytes


def states(seed=0, layers=2, rows=3, tokens=5, hidden=8):
    return torch.randn(layers, rows, tokens, hidden, generator=torch.Generator().manual_seed(seed))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def rand_p(*arguments, seed=5, **options):
    return rand_p_loss(*arguments, **options, generator=seeded(seed))


def rand_c(*arguments, seed=5, **options):
    return rand_c_loss(*arguments, **options, generator=seeded(seed))


def rmu(*arguments, seed=5, scale=20.0, **options):
    return rmu_loss(*arguments, **options, generator=seeded(seed), scale=scale)


RANDOM = [rand_p, rand_c, rmu]
TOGETHER = [partial(triplet_loss, margin=3.0), partial(repbend_loss, away=0.5, alike=0.1)]
LOSSES = [reroute_loss, length_loss, retain_loss, *RANDOM, *TOGETHER]


def kl_reference(adapted, reference, mask):
    """Position by position, in float64, by torch's own distributions."""
    total = 0.0
    for row, column in mask.nonzero().tolist():
        p, q = (torch.distributions.Categorical(logits=side[row, column].double()) for side in (reference, adapted))
        total += torch.distributions.kl_divergence(p, q).item()
    return total / int(mask.sum())


@pytest.mark.parametrize("name", loss_names())
def test_a_loss_says_whether_what_a_step_is_split_into_changes_it(name):
    entry, (adapted, reference) = loss_entry(name), (states(seed, 2, 3, 5, 8) for seed in (1, 2))

    def value(rows):
        given = {key: one.default for key, one in entry.settings.items()} | entry.draw(0, 0)
        return entry.function(adapted[:, rows], reference[:, rows], MASK[rows], count=MASK.sum(), **given)

    whole, parts = value(slice(0, 3)), value(slice(0, 1)) + value(slice(1, 3))
    assert (abs(float(whole - parts)) > 1e-4) == entry.among_tokens


def test_the_kl_of_logits_is_the_reference_positions_are_split_as_one_likes_and_equals_are_0():
    adapted, reference = (3 * states(seed, 1, 3, 5, 11)[0] for seed in (1, 2))
    whole = kl_retain_loss(adapted, reference, MASK)
    assert whole.item() == pytest.approx(kl_reference(adapted, reference, MASK), rel=1e-5)
    assert whole.item() != pytest.approx(kl_reference(reference, adapted, MASK), rel=1e-2)  # base first
    parts = [kl_retain_loss(adapted[i], reference[i], MASK[i], count=MASK.sum()) for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    same = adapted.clone().requires_grad_(True)
    kl_retain_loss(same, adapted, MASK).backward()
    assert kl_retain_loss(same, adapted, MASK).item() == 0 and same.grad.abs().max() < 1e-7
    pad = torch.nn.functional.pad
    padded = pad(adapted, (0, 0, 0, 4), value=7.0), pad(reference, (0, 0, 0, 4)), pad(MASK, (0, 4))
    assert kl_retain_loss(*padded).item() == pytest.approx(whole.item(), rel=1e-6)
    with pytest.raises(ValueError, match="must both be"):
        kl_retain_loss(adapted, reference[:2], MASK)
    with pytest.raises(ValueError, match="at least one token"):
        kl_retain_loss(adapted, reference, torch.zeros_like(MASK))


MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


@given(st.integers(1, 500), st.floats(0.1, 100), st.data())
def test_the_weights_add_up_to_alpha_and_move_from_one_side_to_the_middle(total, alpha, data):
    step = data.draw(st.integers(0, total - 1))
    assert retain_coeff(0, total, alpha) == 0
    assert reroute_coeff(0, total, alpha) == alpha
    assert reroute_coeff(step, total, alpha) + retain_coeff(step, total, alpha) == pytest.approx(alpha)
    assert retain_coeff(step, total, alpha) == pytest.approx(alpha * step / (2 * total))
    assert 0 <= retain_coeff(step, total, alpha) < alpha / 2 < reroute_coeff(step, total, alpha) or step == 0


@pytest.mark.parametrize("step", [10, 11, 400])
def test_behind_the_schedule_both_weigh_the_same(step):
    assert reroute_coeff(step, 10, 5.0) == retain_coeff(step, 10, 5.0) == 2.5


def test_a_step_before_the_first_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        reroute_coeff(-1, 10, 5.0)


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


@pytest.mark.parametrize("loss", LOSSES)
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_official_average_is_the_released_trainers_at_its_own_padding(side):
    """It pads retain rows to 1024; ours sees real tokens alone, in whatever batches."""
    adapted, reference = states(1).requires_grad_(), states(2)
    missing = 1024 - MASK.shape[1]
    wide = (missing, 0) if side == "left" else (0, missing)
    padded = [torch.nn.functional.pad(x, (0, 0, *wide), value=7.0) for x in (adapted, reference)]
    expected = released_retain_loss(*padded, torch.nn.functional.pad(MASK, wide))
    gradient = torch.autograd.grad(expected, adapted)[0]
    ours = retain_loss(adapted, reference, MASK, average="official")
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, adapted)[0], gradient, rtol=1e-4, atol=1e-9)
    count = sum(retain_positions(MASK[rows], "official") for rows in (slice(0, 1), slice(1, 3)))
    parts = [retain_loss(adapted[:, r, :4], reference[:, r, :4], MASK[r, :4], count=count) for r in ([0], [1, 2])]
    last = retain_loss(adapted[:, :, 4:], reference[:, :, 4:], MASK[:, 4:], count=count)
    assert (sum(parts) + last).item() == pytest.approx(expected.item(), rel=1e-5)


@given(st.floats(-2, 4))
def test_the_relative_retain_loss_and_its_slope_by_direction_do_not_know_how_long_states_are(power):
    times = 10.0**power
    adapted, reference = states(1).requires_grad_(), states(2)
    longer = (states(1) * times).requires_grad_()
    losses = [retain_loss(adapted, reference, MASK, scale="relative")]
    losses += [retain_loss(longer, reference * times, MASK, scale="relative")]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    slopes = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (adapted, longer), strict=True)]
    torch.testing.assert_close(slopes[1] * times, slopes[0], rtol=1e-3, atol=1e-7)  # d/d(h/|h|) = |h| d/dh


def test_a_relative_distance_by_hand():
    reference, adapted = torch.tensor([[[[3.0, 4.0], [0.0, 10.0]]]]), torch.tensor([[[[3.0, 3.0], [2.0, 10.0]]]])
    loss = retain_loss(adapted, reference, torch.ones(1, 2), scale="relative")
    assert loss.item() == pytest.approx(RELATIVE_LENGTH * (1 / 5 + 2 / 10) / 2)


@pytest.mark.parametrize("average", ["tokens", "official"])
def test_the_parts_of_a_split_batch_add_up(average):
    adapted, reference = states(1), states(2)
    count = retain_positions(MASK, average)
    rows = [slice(0, 1), slice(1, 3)]
    parts = [retain_loss(adapted[:, r], reference[:, r], MASK[r], average=average, count=count) for r in rows]
    assert sum(parts).item() == pytest.approx(retain_loss(adapted, reference, MASK, average=average).item())
    for loss in (loss for loss in LOSSES if loss is not retain_loss and loss not in TOGETHER):
        parts = [loss(adapted[:, r], reference[:, r], MASK[r], count=MASK.sum()) for r in rows]
        assert sum(parts).item() == pytest.approx(loss(adapted, reference, MASK).item())


def test_half_precision_states_are_averaged_in_float32():
    adapted, reference = states(1).bfloat16(), states(2).bfloat16()
    for loss in LOSSES:
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


def test_random_directions_have_length_one_and_the_cosines_that_are_said():
    positive, centred = (draw_directions(states(hidden=4096), seeded(), centred=c) for c in (False, True))
    others = (
        draw_directions(states(hidden=4096), seeded(6)),
        draw_directions(states(hidden=4096), seeded(6), centred=True),
    )
    for drawn, other, expected in zip((positive, centred), others, (3 / 4, 0), strict=True):
        assert drawn.shape == (2, 1, 4096) and torch.allclose(drawn.norm(dim=-1), torch.ones(2, 1))
        assert (drawn * other).sum(-1)[:, 0].tolist() == pytest.approx([expected] * 2, abs=0.06)
    assert bool((positive >= 0).all()) and centred.mean().abs() < 1e-3
    assert positive.mean(-1)[:, 0].tolist() == pytest.approx(
        [0.866 / 64] * 2, rel=0.02
    )  # the cosine to the vector of ones


@pytest.mark.parametrize(("loss", "centred"), [(rand_p, False), (rand_c, True)])
def test_rand_is_the_distance_of_directions_whatever_the_length(loss, centred):
    u = draw_directions(states(), seeded(), centred=centred)[:, :, None].expand(2, 3, 5, 8)
    assert loss(3 * u, states(), MASK).item() == pytest.approx(0, abs=1e-6)
    assert loss(-u, states(), MASK).item() == pytest.approx(2)
    h = states(1)
    cosine = torch.cosine_similarity(h, u, dim=-1)[:, MASK.bool()]
    assert loss(h, states(), MASK).item() == pytest.approx((2 - 2 * cosine).sqrt().mean().item(), rel=1e-5)
    assert loss(7 * h, states(), MASK).item() == pytest.approx(loss(h, states(), MASK).item(), rel=1e-6)
    assert loss(h, states(), MASK, seed=6) != loss(h, states(), MASK)


def test_rmu_is_the_distance_to_a_state_of_the_scales_length():
    u = draw_directions(states(), seeded())[:, :, None].expand(2, 3, 5, 8)
    assert rmu(20 * u, states(), MASK).item() == pytest.approx(0, abs=1e-5)
    assert rmu(0 * u, states(), MASK).item() == pytest.approx(20)
    assert rmu(-u, states(), MASK, scale=3).item() == pytest.approx(4, rel=1e-6)
    assert rmu(2 * states(1), states(), MASK) != rmu(states(1), states(), MASK)


@pytest.mark.parametrize("loss", RANDOM)
def test_following_the_gradient_leads_to_the_drawn_state(loss):
    h, centred = states(1).requires_grad_(), loss is rand_c
    target = draw_directions(h, seeded(), centred=centred)[:, :, None] * (20 if loss is rmu else 1)
    loss(h, states(), MASK).backward()
    moved = (h - 0.5 * h.grad).detach()
    before, after = (torch.cosine_similarity(x, target, dim=-1)[:, MASK.bool()] for x in (h.detach(), moved))
    assert bool((after > before).all()) and torch.equal(moved[:, MASK == 0], h.detach()[:, MASK == 0])
    assert loss(moved, states(), MASK) < loss(h, states(), MASK)


def test_following_rerouting_leads_away_from_the_reference():
    h, reference = states(1).requires_grad_(), states(2)
    reroute_loss(h, reference, MASK).backward()
    before, after = (torch.cosine_similarity(x, reference, dim=-1) for x in (h, h - 0.5 * h.grad))
    turned = (before > 0) & MASK.bool()
    assert bool((after < before)[turned].all()) and bool((h.grad[~turned] == 0).all())


def pairwise(adapted, reference):
    """Both later losses, token by token and pair by pair, of ``(L, N, H)``."""

    def apart(a, b):
        return 1 - (a @ b) / (a.norm() * b.norm())

    triplet, repbend = [], []
    for h, base in zip(adapted, reference, strict=True):
        mean = sum(h) / len(h)
        triplet += [max(0, apart(x, mean) - apart(x, y) + 3.0) for x, y in zip(h, base, strict=True)]
        cosines = [1 - apart(x, y) for i, x in enumerate(h) for j, y in enumerate(h) if i != j]
        repbend += [
            -0.5 * (x - y).norm() + 0.1 * (1 - sum(cosines) / len(cosines)) for x, y in zip(h, base, strict=True)
        ]
    return sum(triplet) / len(triplet), sum(repbend) / len(repbend)


def test_the_later_losses_are_those_of_their_formulas_and_so_are_their_gradients():
    adapted, reference = states(1).requires_grad_(), states(2)
    counted = MASK.bool()
    for loss, expected in zip(TOGETHER, pairwise(adapted[:, counted], reference[:, counted]), strict=True):
        ours = loss(adapted, reference, MASK)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = [torch.autograd.grad(one, adapted, retain_graph=True)[0] for one in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_passes_of_the_later_losses_are_averaged_by_their_tokens():
    adapted, reference, total = states(1), states(2), MASK.sum()
    for loss in TOGETHER:
        parts = [(loss(adapted[:, r], reference[:, r], MASK[r]), MASK[r].sum()) for r in (slice(0, 1), slice(1, 3))]
        given = [loss(adapted[:, r], reference[:, r], MASK[r], count=total) for r in (slice(0, 1), slice(1, 3))]
        assert sum(given).item() == pytest.approx(sum(value * n for value, n in parts).item() / total.item())


def test_one_token_has_no_other_to_be_like():
    one, there = torch.tensor([[1, 0, 0, 0, 0]]), states(1, rows=1)
    assert repbend_loss(there, states(2, rows=1), one, away=0.5, alike=1e6) > 1e5  # 1, not a division by zero
    assert triplet_loss(there, there, one, margin=3.0).item() == pytest.approx(3)


@pytest.mark.parametrize("distance", [0.0, 1e-4, 1e-1])
def test_slopes_where_an_adapter_starts(distance):
    """The cosine's slope goes with the distance, that of L2 does not; equal states have one towards each other."""
    reference = states(2)
    side = torch.nn.functional.normalize(states(3), dim=-1)

    def slope(loss):
        h = (reference + distance * side).requires_grad_()
        return torch.autograd.grad(loss(h, reference, MASK), h)[0].norm().item()

    cosine, triplet, repbend, far = (
        slope(loss) for loss in (reroute_loss, *TOGETHER, partial(repbend_loss, away=0.5, alike=1e-9))
    )
    assert cosine < 1e-6 + distance  # nothing to go by at a fresh LoRA
    assert triplet > 1e-2 and repbend > 1e-3  # by the mean, by the other tokens
    pushed = 0.5 / MASK.sum().item() ** 0.5 / 2**0.5  # each of the tokens of two layers by away / (layers * tokens)
    assert far == pytest.approx(pushed if distance else 0, rel=1e-2, abs=1e-6)  # torch's slope of |0| is 0


def test_what_is_drawn_depends_on_run_and_step_as_the_loss_says():
    def first(name, seed, step):
        return torch.rand(4, **loss_entry(name).draw(seed, step)).tolist()

    assert first("rand_p", 0, 3) == first("rand_p", 0, 3) != first("rand_p", 0, 4)
    assert first("rand_p", 1, 3) != first("rand_p", 0, 3)
    assert first("rmu", 0, 3) == first("rmu", 0, 4) != first("rmu", 1, 4)
    assert loss_entry("rr").draw(0, 0) == {}


PLAIN = ["circuit_breaker.keep_length=0", "circuit_breaker.adversary.steps=0", "training.held_out=2"]


def of(name, model_folder, *overrides):
    return load_recipe(
        "miniature", [f"model={model_folder}", *OPTIONS, *PLAIN, f"circuit_breaker.loss={name}", *overrides]
    )


@pytest.mark.parametrize("name", ["rand_p", "rand_c", "rmu", "triplet", "repbend"])
def test_every_loss_trains_and_its_card_says_which(name, model_folder, examples, tmp_path):
    out = train(of(name, model_folder, "training.max_steps=3"), tmp_path / "run", examples)
    first, *_, last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert first["grad_norm"] > 1e-3  # unlike a cosine's, at a fresh adapter
    own = loss_entry(name).measure is not None
    assert first["held_out_retain_cosine"] == pytest.approx(1, abs=1e-3)
    assert ("held_out_retain_cosine_to_draw" in first) == own
    assert last["held_out_circuit_breaker_cosine"] < 1
    weights = load_file(out / "adapter_model.safetensors")
    assert all(bool(value.any()) for key, value in weights.items() if "lora_B" in key)
    card = (out / "README.md").read_text()
    assert f"Loss `{name}`" in card and loss_entry(name).source in card and ("| cosine_to_draw |" in card) == own


def test_resuming_draws_the_same_states_and_splitting_too(model_folder, examples, tmp_path):
    recipe = of("rand_p", model_folder, "training.max_steps=4")
    whole = train(recipe, tmp_path / "whole", examples)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", examples, StoppingProgress(at=3))
    train(recipe, tmp_path / "run", examples)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["rand_p", "rmu"])
def test_splitting_a_batch_changes_no_random_loss(name, model_folder, examples, tmp_path):
    first = []
    for parts in (1, 4):
        recipe = of(
            name,
            model_folder,
            "training.max_steps=2",
            f"training.gradient_accumulation_steps={parts}",
            "lora.dropout=0",
        )
        out = train(recipe, tmp_path / str(parts), examples)
        first.append([json.loads(line)["reroute_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert first[0] == pytest.approx(first[1], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=rrr"], "unknown loss `rrr`, did you mean `rr`"),
        (["loss=rmu", "keep_length=1"], "`keep_length` must be 0 with the loss `rmu`"),
        (["loss=rmu", "adversary.steps=1"], r"`adversary\.steps` must be 0 with the loss `rmu`, it goes with `rr`"),
        (["loss=rmu", "loss_settings.scal=1"], "unknown setting of loss `rmu` `scal`, did you mean `scale`"),
        (["loss=rmu", "loss_settings.scale=0"], "`scale` of loss `rmu` must be a number above 0 .*, got 0"),
        (["loss=rmu", "loss_settings.scale=yes"], "must be a number above 0 .*, got True"),
        (["loss_settings.scale=1"], "unknown setting of loss `rr` `scale`"),
        (["loss=repbend", "keep_length=1"], "`keep_length` must be 0 with the loss `repbend`"),
        (["loss=triplet", "loss_settings.away=1"], "unknown setting of loss `triplet` `away`"),
        (["loss=repbend", "loss_settings.margin=1"], "unknown setting of loss `repbend` `margin`"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(model_folder, overrides, message):
    with pytest.raises(UserError, match=message):
        of("rr", model_folder, *(f"circuit_breaker.{one}" for one in overrides))


def test_settings_are_filled_in_and_losses_that_cannot_be_called_are_refused(model_folder):
    assert of("rmu", model_folder).circuit_breaker.loss_settings == {"scale": 20.0}
    assert of("rr", model_folder).circuit_breaker.loss_settings == {}
    assert loss_names()[:6] == ["rr", "rand_p", "rand_c", "rmu", "triplet", "repbend"]
    broken = LossEntry("x", lambda adapted, reference, mask, *, count: None, "", "", "", {"margin": Setting(1, "")})
    with pytest.raises(TypeError, match=r"`x` must take \(adapted, reference, mask, count=\.\.\., margin=\.\.\.\)"):
        register_loss(broken)
    assert "x" not in loss_names()
    for name in ("rr", "RR", " rmu"):
        with pytest.raises(UserError, match=f"the loss `{name}` has the name of mm-cb's own .*: rename yours"):
            register_loss(replace(loss_entry("rr"), name=name))


def test_a_run_that_was_begun_before_losses_had_names_goes_on(model_folder, examples, tmp_path):
    recipe = of("rr", model_folder, "training.max_steps=4")
    with pytest.raises(Stop):
        train(recipe, tmp_path, examples, StoppingProgress(at=3))
    file = tmp_path / "run.json"
    held = json.loads(file.read_text())
    del held["recipe"]["circuit_breaker"]["loss"], held["recipe"]["circuit_breaker"]["loss_settings"], held["seal"]
    file.write_text(json.dumps(held | {"schema": 1}))
    with pytest.raises(UserError, match="circuit_breaker.loss"):
        train(of("rand_p", model_folder), tmp_path, examples)
    train(recipe, tmp_path, examples)


def test_states_in_bfloat16_are_measured_in_float32():
    """A long state's distance has more digits than bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)
    adapted = (20 + torch.randn(2, 64, 256, generator=generator)).bfloat16()
    mask = torch.ones(64)
    for name in loss_names():
        entry = loss_entry(name)
        told = {**full_settings(name, {}), **({} if entry.random is None else entry.draw(0, 0))}
        short = entry.function(adapted, adapted.roll(1, 1), mask, **told)
        told |= {} if entry.random is None else entry.draw(0, 0)
        long = entry.function(adapted.float(), adapted.float().roll(1, 1), mask, **told)
        assert short.dtype == torch.float32 and short.item() == pytest.approx(long.item(), rel=1e-6), name
