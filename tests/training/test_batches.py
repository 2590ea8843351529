import dataclasses
from collections import Counter

import pytest
import torch

from mm_cb.errors import UserError
from mm_cb.training.batches import PairCollator, PairedExamples
from tests.tiny_llava import tiny_llava
from tests.training.conftest import make_example

MASKS = {"text": "user_and_assistant", "multimodal": "after_image"}


def rows(examples, **options):
    return PairedExamples(examples, **{"steps": 5, "batch_size": 4, "batches": "alternate", "seed": 0, **options})


def test_modalities_alternate_by_step_and_both_sets_match(examples):
    dataset = rows(examples)
    assert len(dataset) == 20
    for index in range(20):
        pair = dataset[index]
        expected = ["text", "multimodal"][index // 4 % 2]
        assert (pair.circuit_breaker.set, pair.retain.set) == ("circuit_breaker", "retain")
        assert pair.circuit_breaker.modality == pair.retain.modality == expected


def test_examples_are_all_used_before_any_is_used_again(examples):
    dataset = rows(examples, steps=6, batch_size=4, batches="text")
    used = Counter(dataset[i].circuit_breaker.id for i in range(len(dataset)))
    assert len(used) == 6 and set(used.values()) == {4}
    assert len({dataset[i].circuit_breaker.id for i in range(6)}) == 6


def test_the_seed_decides_the_order(examples):
    def ids(seed):
        dataset = rows(examples, seed=seed)
        return [(dataset[i].circuit_breaker.id, dataset[i].retain.id) for i in range(len(dataset))]

    assert ids(0) == ids(0) != ids(1)


def test_a_missing_set_or_modality_is_named(examples):
    text_only = [example for example in examples if example.modality == "text"]
    assert rows(text_only, batches="text")[0].retain.modality == "text"
    with pytest.raises(ValueError, match="multimodal examples of the circuit_breaker set"):
        rows(text_only)
    with pytest.raises(ValueError, match="text examples of the retain set"):
        rows([example for example in examples if example.set == "circuit_breaker"])


@pytest.mark.parametrize("modality", ["text", "multimodal"])
def test_the_collator_encodes_both_sets_apart(examples, modality):
    model = tiny_llava()
    dataset = rows(examples, batches=modality)
    pairs = [dataset[i] for i in range(3)]
    batch = PairCollator(model, MASKS)(pairs)
    assert batch["modality"] == modality
    for name in ("circuit_breaker", "retain"):
        alone = [model.encode_chats([getattr(p, name).messages], [getattr(p, name).images]) for p in pairs]
        widths = [inputs.input_ids.shape[1] for inputs in alone]
        assert batch[name].input_ids.shape == batch[f"{name}_mask"].shape == (3, max(widths))
        assert batch[name].attention_mask.sum(1).tolist() == widths
        assert (batch[name].pixel_values is None) == (modality == "text")
        assert torch.all(batch[f"{name}_mask"] <= batch[name].attention_mask)


def test_an_example_that_cannot_be_encoded_is_named():
    bad = dataclasses.replace(make_example(0, "retain"), messages=[{"role": "user", "content": "look <image>"}])
    pairs = [rows([make_example(0, "circuit_breaker"), bad], batches="text")[0]]
    with pytest.raises(UserError, match="retain-0-0.*image placeholder"):
        PairCollator(tiny_llava(), MASKS)(pairs)
