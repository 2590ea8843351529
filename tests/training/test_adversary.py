"""The adversary inside training: what it may change, that it works, and where it is used."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_cb.training.adversary import Adversary, perturb_pictures
from mm_cb.training.hidden_states import lay_out, target_states
from mm_cb.training.losses import length_loss, reroute_loss
from tests.training.test_trainer import batch_of, build  # noqa: F401 - a fixture

LENGTHS = (4, 6)


def sample(seed, shape=(10, 4)):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(shape, generator=generator) * torch.tensor([1.0] * 4 + [3.0] * 6)[:, None]
    place = torch.rand(shape[:-1], generator=generator) < 0.5
    place[[0, 5]] = True
    return embeds, place, torch.randn(shape, generator=generator)


def row_size(embeds, place):
    """Root mean square of each row's pictures, for every token."""
    rows = zip(embeds.split(LENGTHS), place.split(LENGTHS), strict=True)
    return torch.cat([row[there].square().mean().sqrt().expand(len(row), 1) for row, there in rows])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 4), radius=st.floats(0.01, 3.0))
def test_it_changes_pictures_only_and_no_more_than_the_radius(seed, steps, radius):
    embeds, place, direction = sample(seed)
    before = embeds.clone()
    changed = perturb_pictures(
        embeds, place, LENGTHS, (7, 8), lambda e: (e * direction).sum(), Adversary(steps, radius)
    )
    limit = radius * row_size(embeds, place)
    assert torch.equal(embeds, before) and not changed.requires_grad
    assert torch.equal(changed[~place], embeds[~place])
    assert ((changed - embeds).abs() <= limit * (1 + 1e-5) + 1e-6).all()


def radii(seeds, adversary):
    """The radius of two rows, from how far four steps go along a linear alignment; all entries go equally far."""
    embeds, place, direction = sample(3)
    changed = perturb_pictures(embeds, place, LENGTHS, seeds, lambda e: (e * direction).sum(), adversary)
    moved = (changed - embeds) * direction.sign() / row_size(embeds, place)
    found = [row[there] for row, there in zip(moved.split(LENGTHS), place.split(LENGTHS), strict=True)]
    assert all(torch.allclose(row, row.mean().expand_as(row), atol=1e-5) for row in found)
    return [float(row.mean()) for row in found]


def test_four_steps_reach_the_best_corner_of_each_rows_own_radius():
    assert radii((7, 7), Adversary(4, 0.5)) == pytest.approx([radii((7, 8), Adversary(4, 0.5))[0]] * 2, rel=1e-3)


def test_radii_fill_the_range_evenly():
    drawn = sorted(radius for seed in range(100) for radius in radii((2 * seed, 2 * seed + 1), Adversary(4, 0.5)))
    uniform = [0.5 * (rank + 0.5) / len(drawn) for rank in range(len(drawn))]
    worst = max(abs(a - b) for a, b in zip(drawn, uniform, strict=True)) / 0.5
    assert worst < 1.95 / len(drawn) ** 0.5  # Kolmogorov-Smirnov at p = 0.001


def test_a_row_is_attacked_alike_alone_and_among_others():
    embeds, place, direction = sample(4)
    adversary = Adversary(1, 0.5)  # one step: the start still shows
    together = perturb_pictures(embeds, place, LENGTHS, (7, 8), lambda e: (e * direction).sum(), adversary)
    alone = perturb_pictures(embeds[4:], place[4:], (6,), (8,), lambda e: (e * direction[4:]).sum(), adversary)
    other = perturb_pictures(embeds[4:], place[4:], (6,), (9,), lambda e: (e * direction[4:]).sum(), adversary)
    assert torch.equal(together[4:], alone) and not torch.allclose(other, alone)


def test_it_undoes_the_rerouting_of_a_model_better_than_noise(build):  # noqa: F811
    trainer = build(batches="multimodal", masks={"text": "completion", "multimodal": "completion"}, at=(0, 5))
    batch = batch_of(trainer, range(4))
    plain = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]

    def rerouted(steps_of_adversary, radius):
        adversary = Adversary(steps_of_adversary, radius)
        attacked = build(
            batches="multimodal",
            masks={"text": "completion", "multimodal": "completion"},
            at=(0, 5),
            adversary=adversary,
        )
        torch.manual_seed(1)
        return attacked.compute_loss(attacked.model, batch, return_outputs=True)[1]

    noise, attack = rerouted(1, 1e-6), rerouted(4, 1.0)
    assert noise["reroute_loss"].item() == pytest.approx(plain["reroute_loss"].item(), abs=1e-4)
    assert attack["reroute_loss"] > plain["reroute_loss"] + 1e-3  # the loss it must now train against
    assert attack["retain_loss"].item() == pytest.approx(plain["retain_loss"].item())


def test_it_seeks_the_states_of_clean_pictures_and_the_loss_compares_on_what_it_found(build, monkeypatch):  # noqa: F811
    from mm_cb.training import objective as module

    trainer = build(batches="multimodal", at=(0, 5), adversary=Adversary(1, 1.0), keep_length=0.5)
    batch = batch_of(trainer, range(4))
    rows, first = (
        lay_out(trainer._encoder, batch["circuit_breaker"]["inputs"], batch["circuit_breaker"]["mask"]),
        trainer._objective.first_block,
    )
    moved = rows.embeds + 0.1 * torch.randn(rows.embeds.shape, generator=torch.Generator().manual_seed(0))
    asked = []

    def replaced(embeds, place, lengths, seeds, alignment, adversary):
        asked.append((alignment(embeds).item(), alignment(moved).item()))
        return moved

    monkeypatch.setattr(module, "perturb_pictures", replaced)
    parts = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
    targets = trainer._rerouting.target_layers
    adapted, reference = target_states(trainer._encoder, rows._replace(embeds=moved), first, targets)
    own, clean = target_states(trainer._encoder, rows, first, targets)
    assert parts["reroute_loss"].item() == pytest.approx(reroute_loss(adapted, reference, rows.mask).item(), rel=1e-5)
    assert parts["length_loss"].item() == pytest.approx(length_loss(adapted, reference, rows.mask).item(), rel=1e-5)
    for found, states in zip(asked[0], (own, adapted), strict=True):
        cosines = torch.cosine_similarity(states, clean, dim=-1)[:, rows.mask.bool()]
        assert found == pytest.approx(cosines.sum().item(), rel=1e-5)


def test_keeping_length_adds_its_weighted_share_and_changes_no_other_loss(build):  # noqa: F811
    totals, parts = {}, {}
    for weight in (0.0, 0.3, 0.6):
        trainer = build(batches="multimodal", at=(0, 5), keep_length=weight)
        totals[weight], parts[weight] = trainer.compute_loss(
            trainer.model, batch_of(trainer, range(4)), return_outputs=True
        )
    assert parts[0.0]["length_loss"].item() == 0 and parts[0.3]["length_loss"] > 1e-5
    assert parts[0.6]["length_loss"].item() == parts[0.3]["length_loss"].item()
    for name in ("reroute_loss", "retain_loss"):
        assert parts[0.6][name].item() == parts[0.0][name].item()
    for weight in (0.3, 0.6):  # at step 0 the weight of the reroute loss is alpha
        added = trainer._rerouting.alpha * weight * parts[weight]["length_loss"]
        assert (totals[weight] - totals[0.0]).item() == pytest.approx(added.item(), rel=1e-3)


def test_text_batches_have_nothing_to_attack(build):  # noqa: F811
    losses = []
    for adversary in (None, Adversary(2, 1.0)):
        trainer = build(batches="text", at=(1, 5), adversary=adversary)
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer, range(4))).item())
    assert losses[0] == losses[1]
