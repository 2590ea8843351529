"""What rows of both sets begin with is not rerouted and retained at once."""

import random

import pytest
import torch

from mm_cb.models import TokenRole
from mm_cb.training.batches import PairCollator, PairedExamples, RowPair
from mm_cb.training.openings import Openings
from tests.tiny_llava import tiny_llava
from tests.training.conftest import make_example

ALL = {"text": "all", "multimodal": "all"}


def alike(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_as_many_tokens_are_shared_as_with_the_row_that_shares_most():
    rng = random.Random(0)
    for _ in range(200):
        rows = [[rng.choice([1, 2, 256, 70_000]) for _ in range(rng.randrange(6))] for _ in range(rng.randrange(6))]
        row = [rng.choice([1, 2, 256, 70_000]) for _ in range(rng.randrange(6))]
        assert Openings(rows).shared(row) == max((alike(row, one) for one in rows), default=0)


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def batches(model, examples, modality):
    pairs = PairedExamples(examples, steps=1, batch_size=6, batches=modality, seed=0)
    openings = Openings.of(model, pairs.drawn())
    drawn = [pairs[i] for i in range(6)]
    return PairCollator(model, ALL)(drawn), PairCollator(model, ALL, openings)(drawn)


@pytest.mark.parametrize("modality", ["text", "multimodal"])
def test_a_token_that_all_rows_begin_with_carries_no_reroute_loss_and_no_other_loses_any(model, examples, modality):
    plain, found = batches(model, examples, modality)
    assert torch.equal(plain["retain"]["mask"], found["retain"]["mask"])
    inputs = [plain[name]["inputs"] for name in ("circuit_breaker", "retain")]
    rows = [
        ids[real.bool()].tolist() for one in inputs for ids, real in zip(one.input_ids, one.attention_mask, strict=True)
    ]
    common = min(alike(rows[0], row) for row in rows)
    images = (inputs[0].roles == TokenRole.IMAGE).any(0).nonzero()[:, 0].tolist()
    opening = min([common, *images])  # behind a picture nothing is the same
    assert opening > 0
    mask = found["circuit_breaker"]["mask"]
    assert not mask[:, :opening].any() and torch.equal(mask[:, opening:], plain["circuit_breaker"]["mask"][:, opening:])


def test_words_that_a_single_retain_row_begins_with_count_too_and_the_rest_does_not(model):
    known = make_example(0, "circuit_breaker")
    same = make_example(1, "retain")
    words = known.messages[0]["content"][-1]["text"].split()
    same.messages[0]["content"][-1]["text"] = " ".join([*words[:2], "circle"])
    other = make_example(2, "retain")
    mask = PairCollator(model, ALL, Openings.of(model, [known, same, other]))([RowPair(known, same)])[
        "circuit_breaker"
    ]["mask"]
    opening = 1 + 2  # the template's [INST] and two words
    assert mask[0].tolist() == [0] * opening + [1] * (mask.shape[1] - opening)


def test_a_row_that_a_retain_row_begins_with_as_a_whole_keeps_its_last_token(model):
    row = make_example(0, "circuit_breaker")
    whole = Openings.of(model, [make_example(0, "retain").__class__(row.id, row.messages, [], "retain")])
    mask = PairCollator(model, ALL, whole)([RowPair(row, make_example(0, "retain"))])["circuit_breaker"]["mask"]
    assert mask[0].tolist() == [0] * (mask.shape[1] - 1) + [1]
