import dataclasses
from collections import Counter

import pytest
import torch

from mm_cb.core.errors import UserError
from mm_cb.training.batches import PairCollator, PairedExamples, RowPair, hold_out, split_batch
from mm_cb.training.openings import Openings
from mm_cb.training.rr_config import RRConfig
from mm_cb.training.rr_trainer import _tell_left_out
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


def test_every_further_pass_over_the_rows_is_another_permutation(examples):
    dataset = rows(examples, steps=6, batch_size=4, batches="text")
    for name in RowPair._fields:
        ids = [getattr(dataset[i], name).id for i in range(24)]
        passes = {tuple(ids[start : start + 6]) for start in range(0, 24, 6)}
        assert len(passes) == 4 and len({frozenset(one) for one in passes}) == 1


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
    with pytest.raises(ValueError, match="text examples of the retain set, it holds none: add some.$"):
        rows([example for example in examples if example.set == "circuit_breaker"])
    for kind, other in (("text", "multimodal"), ("multimodal", "text")):
        with pytest.raises(ValueError, match=f"add some, or set `batches={kind}`"):
            rows([example for example in examples if example.modality == kind], batches=other)


def test_ends_that_are_left_out_are_those_of_circuit_breaker_rows_alone(examples):
    dataset = PairedExamples(examples, steps=1, batch_size=4, batches="text", seed=0)
    pairs = [dataset[i] for i in range(4)]
    counted, left = (PairCollator(tiny_llava(), MASKS, count_ends=count)(pairs) for count in (True, False))
    assert torch.equal(left["retain"]["mask"], counted["retain"]["mask"])
    fewer = counted["circuit_breaker"]["mask"] - left["circuit_breaker"]["mask"]
    assert torch.equal(fewer, (counted["circuit_breaker"]["inputs"].input_ids == 2).long()) and fewer.sum() == 4
    bare = dataclasses.replace(
        examples[0],
        messages=[examples[0].messages[0], {"role": "assistant", "content": [{"type": "text", "text": ""}]}],
    )
    with pytest.raises(UserError, match="nothing but the end of an answer .*answer_ends"):
        PairCollator(tiny_llava(), {**MASKS, "text": "completion"}, count_ends=False)([RowPair(bare, pairs[0].retain)])


def test_a_row_that_is_a_retain_rows_beginning_keeps_its_last_word_where_ends_are_left_out(examples):
    breaker = next(e for e in examples if e.modality == "text" and e.set == "circuit_breaker")
    retain = dataclasses.replace(breaker, set="retain")
    openings = Openings.of(tiny_llava(), [retain])
    made = [
        PairCollator(tiny_llava(), MASKS, o, count_ends=False)([RowPair(breaker, retain)]) for o in (None, openings)
    ]
    alone, shared = (batch["circuit_breaker"]["mask"][0].nonzero().flatten().tolist() for batch in made)
    assert shared == alone[-1:]


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
        inputs, mask = batch[name]["inputs"], batch[name]["mask"]
        assert inputs.input_ids.shape == mask.shape == (3, max(widths))
        assert inputs.attention_mask.sum(1).tolist() == widths
        assert (inputs.pixel_values is None) == (modality == "text")
        assert torch.all(mask <= inputs.attention_mask)


def test_a_part_of_several_rows_holds_at_most_the_real_tokens_of_a_pass(examples):
    dataset = rows(examples, batches="text")
    batch = PairCollator(tiny_llava(), MASKS)([dataset[i] for i in range(8)])
    for limit in range(1, batch["retain"]["inputs"].input_ids.numel() + 1):
        parts = split_batch(batch, limit)
        for name in RowPair._fields:
            own = [part[name] for part in parts if name in part]
            assert [id for rows in own for id in rows["ids"]] == batch[name]["ids"]
            for part in own:
                assert len(part["ids"]) == 1 or part["inputs"].attention_mask.sum() <= limit


def test_an_example_that_cannot_be_encoded_is_named():
    bad = dataclasses.replace(make_example(0, "retain"), messages=[{"role": "user", "content": "look <image>"}])
    pairs = [rows([make_example(0, "circuit_breaker"), bad], batches="text")[0]]
    with pytest.raises(UserError, match="retain-0-0.*image placeholder"):
        PairCollator(tiny_llava(), MASKS)(pairs)


@pytest.fixture
def damaged(examples, tmp_path):
    """The examples, a third of whose pictures cannot be read."""
    changed = list(examples)
    for place in range(1, len(examples), 6):  # multimodal rows of both sets
        changed[place] = dataclasses.replace(examples[place], images=[tmp_path / "nowhere.png"])
    assert {changed[place].modality for place in range(1, len(examples), 6)} == {"multimodal"}
    return changed, {changed[place].id for place in range(1, len(examples), 6)}


def test_rows_whose_picture_cannot_be_read_are_an_error_or_left_out_and_told(damaged):
    examples, bad = damaged
    assert {name for _, name in ((e.set, e.set) for e in examples if e.id in bad)} == {"circuit_breaker", "retain"}
    told = []
    skipping = rows(examples, steps=6, batches="multimodal", on_unreadable=lambda e, error: told.append((e.id, error)))
    plain = rows(examples, steps=6, batches="multimodal")
    pairs = [skipping[i] for i in range(len(skipping))]
    assert {e.id for pair in pairs for e in pair}.isdisjoint(bad)
    assert {id for id, _ in told} == bad and all("nowhere.png" in str(error) for _, error in told)
    for i, pair in enumerate(pairs):  # all others are where they were
        for ours, theirs in zip(pair, plain[i], strict=True):
            assert theirs.id in bad or ours.id == theirs.id
    assert [pair[0].id for pair in pairs] == [skipping[i][0].id for i in range(len(skipping))]
    with pytest.raises(UserError, match=r"nowhere\.png"):
        PairCollator(tiny_llava(), MASKS)([plain[i] for i in range(len(plain))])


def test_nothing_that_can_be_read_is_an_error(damaged):
    examples = [e if e.modality == "text" else dataclasses.replace(e, images=damaged[0][1].images) for e in damaged[0]]
    with pytest.raises(UserError, match="not one picture"):
        rows(examples, batches="multimodal", on_unreadable=lambda *_: None)[0]


def test_rows_set_aside_can_be_read(damaged):
    examples, bad = damaged
    told = []
    others, aside = hold_out(examples, 3, 0, "alternate", lambda example, error: told.append(example.id))
    assert len(aside) == 6 and {e.id for pair in aside for e in pair}.isdisjoint(bad) and set(told) <= bad
    assert {examples[i].id for i in others}.isdisjoint(e.id for pair in aside for e in pair)
    for pair in aside:
        assert (pair.circuit_breaker.set, pair.retain.set) == ("circuit_breaker", "retain")
    as_before = hold_out(examples, 3, 0, "alternate")
    assert any(e.id in bad for pair in as_before[1] for e in pair) or not told


@pytest.mark.parametrize(("rows", "aside"), [(1, 0), (2, 1), (5, 2), (15, 7), (16, 8), (40, 8)])
def test_few_rows_set_fewer_aside_where_nobody_says_how_many(rows, aside):
    made = [make_example(i, s) for s in ("circuit_breaker", "retain") for i in range(rows)]
    others, pairs = hold_out(made, None, 0, "text")
    assert (len(others), len(pairs)) == (2 * rows - 2 * aside, aside)
    assert pairs == hold_out(made, aside, 0, "text")[1]


def test_more_than_half_of_the_rows_cannot_be_set_aside(examples):
    texts = [example for example in examples if example.modality == "text"]
    breakers = sum(example.set == "circuit_breaker" for example in texts)
    others, aside = hold_out(texts, breakers // 2, 0, "text")
    assert len(aside) == breakers // 2 and len(others) == len(texts) - 2 * len(aside)
    with pytest.raises(
        UserError, match=rf"held_out` must be at most half of the rows, got 100 of {breakers} text rows"
    ):
        hold_out(texts, 100, 0, "text")


def test_rows_of_a_kind_that_no_batch_holds_are_told(examples, tmp_path, recwarn):
    text = RRConfig(output_dir=tmp_path, batches="text", target_layers=[2])
    with pytest.warns(UserWarning, match=r"^\d+ rows with pictures: not trained on \(`batches` is `text`\)"):
        _tell_left_out(text, examples)
    recwarn.clear()
    _tell_left_out(text, [example for example in examples if example.modality == "text"])
    _tell_left_out(RRConfig(output_dir=tmp_path, batches="alternate", target_layers=[2]), examples)
    assert not recwarn.list
