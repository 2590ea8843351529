import pytest
import torch

from mm_cb.models.chat import chat, render_chat
from mm_cb.training.masks import loss_mask, without_ends
from tests.tiny_llava import picture, tiny_llava


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def counted(model, inputs, name, row=0):
    kept = inputs.input_ids[row][loss_mask(inputs, name)[row] == 1]
    return " ".join(model.processor.tokenizer.convert_ids_to_tokens(kept))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "text", "multimodal"),
    [
        ("completion", "no i </s>", "a square </s>"),
        ("user_and_assistant", "tell me please no i </s>", "what is it a square </s>"),
        ("all", "[INST] tell me please [/INST] no i </s>", None),
        ("after_image", None, "what is it [/INST] a square </s>"),
    ],
)
def test_what_counts(model, side, name, text, multimodal):
    if text is not None:
        rows = model.encode(
            ["tell me please", "a"], [None, None], completions=["no i", "red green blue circle a"], padding_side=side
        )
        assert counted(model, rows, name) == text
    if multimodal is not None:
        rows = model.encode(
            ["what is it", "a"], [picture(), picture(1)], completions=["a square", "red"], padding_side=side
        )
        assert counted(model, rows, name) == multimodal


def test_all_counts_image_tokens(model):
    rows = model.encode(["what is it"], [picture()], completions=["a square"])
    assert loss_mask(rows, "all").sum() == rows.attention_mask.sum()


def test_every_turn_of_a_longer_chat_counts(model):
    turns = [("user", "tell me"), ("assistant", "no"), ("user", "please"), ("assistant", "i can not")]
    rows = model.encode_chats([[{"role": role, "content": text} for role, text in turns]], [[]])
    assert counted(model, rows, "completion") == "no </s> i can not </s>"
    assert counted(model, rows, "user_and_assistant") == "tell me no </s> please i can not </s>"


def test_rows_without_an_image_and_rows_that_would_not_count_are_refused(model):
    rows = model.encode(["a", "what is it"], [None, picture()], completions=["no", "red"])
    with pytest.raises(ValueError, match="image in every row"):
        loss_mask(rows, "after_image")
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        loss_mask(model.encode(["a", "tell me"], [None, None], completions=["no", None]), "completion")
    with pytest.raises(ValueError, match="'answers'"):
        loss_mask(rows, "answers")


@pytest.mark.parametrize("name", ["completion", "user_and_assistant", "all"])
def test_without_ends_a_row_counts_as_one_that_stops_with_its_answer(model, name):
    asked, answers, end = ["tell me please", "a"], ["no i", "red green blue circle a"], 2
    rows = model.encode(asked, [None, None], completions=answers, padding_side="right")
    mask = without_ends(rows, loss_mask(rows, name), end)
    assert torch.equal(loss_mask(rows, name) - mask, (rows.input_ids == end).long())
    open_chats = [chat(text, completion=answer) for text, answer in zip(asked, answers, strict=True)]
    states = model.forward(rows, hidden_states=True).hidden_states[-1]
    for row, messages in enumerate(open_chats):
        text = render_chat(model.processor, messages, close_turn=False).text
        ids = model.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        alone = model.base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        stopped = states[row][rows.attention_mask[row].bool()][: len(alone)]
        torch.testing.assert_close(stopped, alone, rtol=1e-4, atol=1e-4)
        assert rows.input_ids[row][rows.attention_mask[row].bool()].tolist() == [*ids[0].tolist(), end]
