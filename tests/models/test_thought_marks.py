"""The marks around a thought outlive decoding where a tokenizer has them as special tokens."""

import copy

import pytest

from mm_cb.core.thoughts import MARKS, answer_in
from mm_cb.models.decoding import texts_of
from tests.models.shapes import sentencepiece_like_tokenizer

PAIRS = [("[THINK]", "[/THINK]"), ("<think>", "</think>"), ("<|START_THINKING|>", "<|END_THINKING|>")]


@pytest.fixture(scope="module")
def tokenizer():
    made = copy.deepcopy(sentencepiece_like_tokenizer())
    made.add_special_tokens({"additional_special_tokens": [*sorted(MARKS), "<|other|>"]})
    return made


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("begin", "end"), PAIRS)
def test_a_thought_is_still_told_from_the_answer(tokenizer, begin, end):
    rows = [ids(tokenizer, f"{begin}soup{end}a tea</s>"), ids(tokenizer, "a tea<|other|></s>")]
    thought, plain = texts_of(tokenizer, rows)
    assert answer_in(thought).strip() == "a tea" and "soup" in answer_in(thought).thought
    assert plain.strip() == "a tea"


@pytest.mark.parametrize(("begin", "end"), PAIRS)
def test_so_is_one_that_the_prompt_had_begun(tokenizer, begin, end):
    (text,) = texts_of(tokenizer, [ids(tokenizer, f"soup{end}a tea</s>")])
    assert answer_in(text, opened=True).strip() == "a tea"


def test_marks_that_enclose_no_thought_are_special_tokens_like_others(tokenizer):
    (text,) = texts_of(tokenizer, [ids(tokenizer, "a tea<|end|>soup<|message|></s>")])
    assert "a tea" in text and "soup" in text and "<|" not in text


def test_a_tokenizer_without_them_decodes_as_ever():
    plain = sentencepiece_like_tokenizer()
    rows = [ids(plain, "soup</s>"), []]
    assert texts_of(plain, rows) == plain.batch_decode(rows, skip_special_tokens=True)
