"""What is measured on held-out rows while training runs."""

import torch

from mm_cb.training.batches import hold_out
from tests.training.test_trainer import build  # noqa: F401  (a fixture)

KEYS = {
    f"held_out_{s}_{k}" for s in ("circuit_breaker", "retain") for k in ("cosine", "norm_reference", "norm_adapted")
}


def test_held_out_pairs_are_of_both_modalities_and_never_trained_on(examples):
    kept, pairs = hold_out(examples, 2, 0, "alternate")
    assert [pair.retain.modality for pair in pairs] == ["text"] * 2 + ["multimodal"] * 2
    assert all(pair.circuit_breaker.modality == pair.retain.modality for pair in pairs)
    aside = {example.id for pair in pairs for example in pair}
    assert len(aside) == 8 and aside.isdisjoint(examples[index].id for index in kept)
    assert len(kept) + len(aside) == len(examples)
    assert hold_out(examples, 2, 0, "alternate")[1] == pairs != hold_out(examples, 2, 1, "alternate")[1]
    assert hold_out(examples, 0, 0, "alternate") == (list(range(len(examples))), [])


def test_a_fresh_adapter_measures_cosine_one_and_equal_norms(build, examples):  # noqa: F811
    trainer = build(scale=0, dropout=0.5)
    trainer._held_out = hold_out(examples, 2, 0, "alternate")[1]
    found = trainer.measure_held_out()
    assert found.keys() == KEYS
    for name in ("circuit_breaker", "retain"):
        assert abs(found[f"held_out_{name}_cosine"] - 1) < 1e-5
        assert found[f"held_out_{name}_norm_reference"] == found[f"held_out_{name}_norm_adapted"] > 0


def test_measuring_draws_no_random_numbers_and_sees_a_change(build, examples):  # noqa: F811
    trainer = build(dropout=0.5)
    trainer._held_out = hold_out(examples, 2, 0, "alternate")[1]
    before = torch.get_rng_state()
    first, second = trainer.measure_held_out(), trainer.measure_held_out()
    assert first == second and torch.equal(torch.get_rng_state(), before)
    assert first["held_out_circuit_breaker_cosine"] < 0.999


def test_the_adapted_norm_moves_with_the_adapted_states_alone(build, examples):  # noqa: F811
    found = []
    for scale in (0, 0.3, 0.6):
        trainer = build(scale=scale)
        trainer._held_out = hold_out(examples, 2, 0, "alternate")[1]
        found.append(trainer.measure_held_out())
    for name in ("circuit_breaker", "retain"):
        assert len({one[f"held_out_{name}_norm_reference"] for one in found}) == 1
        assert len({one[f"held_out_{name}_norm_adapted"] for one in found}) == 3
