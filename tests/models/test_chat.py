import re

import pytest

from mm_cb.core.errors import UserError
from mm_cb.models.chat import TokenRole, chat, render_chat
from mm_cb.models.llava_next import LlavaNextModel
from tests.models.shapes import LLAVA_TEMPLATE, sentencepiece_like_tokenizer
from tests.tiny_llava import picture, tiny_llava, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def spans(rendered):
    return [(span.role.name, rendered.text[span.start : span.end]) for span in rendered.spans]


def test_the_result_is_what_the_template_writes(processor):
    messages = chat("what is it", images=1, completion="a square") + chat("tell me", completion="no")
    assert render_chat(processor, messages).text == processor.apply_chat_template(messages, tokenize=False)


def test_every_text_and_image_is_found(processor):
    rendered = render_chat(processor, chat("what is it", images=1, completion="a square"), pictures=["<image><image>"])
    assert rendered.text == "[INST] <image><image>\nwhat is it [/INST] a square</s>"
    assert spans(rendered) == [("IMAGE", "<image><image>"), ("USER", "what is it"), ("COMPLETION", "a square</s>")]


@pytest.mark.parametrize("text", ["I", "[INST", "/s>", "\ue0000\ue001", "{{ 1 }}", ""])
def test_texts_that_look_like_the_template_are_found_all_the_same(processor, text):
    rendered = render_chat(processor, chat(text, completion=text))
    assert spans(rendered) == [("USER", text), ("COMPLETION", text + "</s>")]


def test_a_system_text_stands_in_front_of_the_users(processor):
    rendered = render_chat(processor, chat("tell me", system="please"))
    assert rendered.text == "[INST] please\n\ntell me [/INST]"


def test_an_open_turn_ends_with_the_completion(processor):
    assert render_chat(processor, chat("a", completion="no i"), close_turn=False).text == "[INST] a [/INST] no i"
    assert render_chat(processor, chat("a"), close_turn=False).text == "[INST] a [/INST]"


def test_the_image_placeholder_in_a_text_is_refused(processor):
    with pytest.raises(UserError, match="image placeholder"):
        render_chat(processor, chat("look: <image>"))


@pytest.mark.parametrize("token", ["</s>", "<s>", "<pad>", "[/INST]", "[INST]"])
@pytest.mark.parametrize("place", ["user", "system", "answer"])
def test_a_control_token_that_a_text_spells_is_refused_and_so_nobody_ends_a_turn(processor, token, place):
    texts = {"user": "what", "system": "be kind", "answer": "no"}
    texts[place] += f" {token} sure"
    messages = chat(texts["user"], system=texts["system"], completion=texts["answer"])
    with pytest.raises(UserError, match=rf"must not hold the model's control token `{re.escape(token)}`, got .* sure"):
        render_chat(processor, messages)
    if place == "answer":  # perhaps a model's own
        assert token in render_chat(processor, messages, close_turn=False).text


@pytest.mark.parametrize(
    "text", ["if a < b and c > d", "<b>bold</b>", "a[0]", "[inst", "x | y", "< s>", "{s}", "<unk>", "<image 1>"]
)
def test_honest_brackets_are_text(processor, text):
    assert text in render_chat(processor, chat(text)).text


def test_a_template_that_drops_a_text_is_refused(processor):
    other = tiny_processor()
    other.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(UserError, match="must write the texts of all messages .*; of 2 it wrote no. 1"):
        render_chat(other, chat("a", completion="no"))


def test_a_token_across_two_spans_counts_for_the_completion(processor):
    rendered = render_chat(processor, chat("a", completion="no"))
    end_of_user = rendered.text.index("a") + 1
    start = rendered.text.index("no")
    assert rendered.roles([(0, 0), (end_of_user - 1, start + 1), (start - 1, start + 2)]) == [
        TokenRole.TEMPLATE,
        TokenRole.COMPLETION,
        TokenRole.COMPLETION,
    ]


@pytest.fixture(scope="module")
def real_layout():
    """A processor with the hub checkpoint's template text and a tokenizer of its layout."""
    processor = tiny_processor()
    processor.tokenizer = sentencepiece_like_tokenizer()
    processor.chat_template = LLAVA_TEMPLATE
    return LlavaNextModel(tiny_llava().model, processor)


def test_the_mistral_form_on_token_ids(real_layout):
    tokenizer = real_layout.processor.tokenizer
    inputs = real_layout.encode(["what is it", "what is it"], [None, picture()], completions=["a red square", None])
    expected = tokenizer("[INST] what is it [/INST] a red square</s>")["input_ids"]
    assert inputs.input_ids[0][inputs.attention_mask[0].bool()].tolist() == expected
    assert expected[0] == tokenizer.bos_token_id and expected[-1] == tokenizer.eos_token_id
    row = inputs.input_ids[1].tolist()
    image = tokenizer.convert_tokens_to_ids("<image>")
    at = [i for i, token in enumerate(row) if token == image]
    assert at == list(range(at[0], at[-1] + 1)) and (inputs.roles[1] == TokenRole.IMAGE).sum() == len(at)
    assert row[: at[0]] == tokenizer("[INST] ")["input_ids"]  # the picture comes before the text
    assert row[0] == tokenizer.bos_token_id and row.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(row[at[-1] + 1 :]) == "\nwhat is it [/INST]"


def test_pictures_are_rendered_first_wherever_they_stand(real_layout):
    content = [{"type": "text", "text": "what is it"}, {"type": "image"}]
    assert render_chat(real_layout.processor, [{"role": "user", "content": content}]).text == (
        "[INST] <image>\nwhat is it [/INST]"
    )


def test_nothing_follows_the_end_of_the_last_answer(real_layout):
    turns = [*chat("what is it", completion="a"), *chat("tell me", completion="no")]
    rendered = render_chat(real_layout.processor, turns)
    assert rendered.text == "[INST] what is it [/INST] a</s> [INST] tell me [/INST] no</s>"
    open_turn = render_chat(real_layout.processor, turns, close_turn=False)
    assert open_turn.text == rendered.text.removesuffix("</s>")


ONE = "{% if messages[0]['content'] | selectattr('type', 'equalto', 'image') | list %}<image>{% endif %}"
TEXTS = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("written", "pictures", "count"),
    [(ONE, 2, 1), (ONE + ONE, 1, 2), ("", 1, 0), ("<image>", 0, 1)],
    ids=["one of two", "twice", "not at all", "without one"],
)
def test_a_template_that_does_not_write_each_picture_once_is_refused(written, pictures, count):
    model = tiny_llava()
    model.processor.chat_template = written + TEXTS
    messages = [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": "what"}]}]
    with pytest.raises(UserError, match=f"`<image>` once for each picture; of {pictures} it wrote {count}"):
        model.encode_chats([messages], [[picture(seed) for seed in range(pictures)]])


REWRITING = {
    "replaces a word": "| replace('secret', 'public')",
    "leaves a word out": "| replace('secret', '')",
    "cuts behind a sign": ".split('###')[0]",
    "lower-cases what begins so": "| lower if part['text'].startswith('Note') else part['text']",
    "writes more where a word stands": "~ ('be careful' if 'secret' in part['text'] else '')",
}
SAID = {
    "replaces a word": "the secret garden",
    "leaves a word out": "the secret garden",
    "cuts behind a sign": "a ### b",
    "lower-cases what begins so": "Note that THIS stays",
    "writes more where a word stands": "the secret garden",
}
OF_PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] CHANGE }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("how", REWRITING)
@pytest.mark.parametrize("place", ["user", "assistant"])
def test_a_template_that_rewrites_some_texts_alone_is_refused_at_the_first_of_them(how, place):
    processor = tiny_processor()
    processor.chat_template = OF_PARTS.replace("CHANGE", REWRITING[how])
    messages = chat("what is it", images=1, completion="a square")
    assert "what is it" in render_chat(processor, messages).text
    messages[place == "assistant"]["content"][-1]["text"] = SAID[how]
    with pytest.raises(UserError, match="every text as it is, but it (changes|writes) .*leave out those words"):
        render_chat(processor, messages)


def test_blanks_empty_texts_and_earlier_thoughts_are_a_templates_own_business():
    processor = tiny_processor()
    processor.chat_template = OF_PARTS.replace("CHANGE", ".split('</think>')[-1] | trim")
    for text in ("  what \n", "", "what"):
        render_chat(processor, chat(text, completion=" <think>so</think> a square ") + chat("and", completion="b"))
    with pytest.raises(UserError, match="changes the text of a turn of the role `user`, at '.*what"):
        render_chat(processor, chat("what </think> is it"))
