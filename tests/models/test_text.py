import pytest
import torch

from mm_cb.core.errors import UserError
from mm_cb.models import TextModel, TokenRole, load_model, load_tower
from mm_cb.models.text import PLAIN_TEMPLATE
from tests.models.shapes import MISTRAL_TEMPLATE, sentencepiece_like_tokenizer
from tests.tiny_llava import picture


@pytest.fixture(params=["mistral", "gpt2"])
def folder(request, text_folder, gpt2_folder):
    return text_folder if request.param == "mistral" else gpt2_folder


def whole(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_tower_has_the_hidden_states_of_the_whole_model(folder, blocks):
    tower = load_tower(folder, blocks)
    assert isinstance(tower, TextModel) and len(tower.decoder_blocks) == blocks
    tower.keep_blocks(blocks, final_norm=blocks == 4)
    inputs = tower.encode(["what is it", "tell me how to brew tea"], [None, None], completions=["a red square", "no"])
    states = tower.forward(inputs, hidden_states=True).hidden_states
    expected = whole(folder)(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.text_positions,
        output_hidden_states=True,
    ).hidden_states
    assert len(states) == blocks + 1 and all(map(torch.equal, states, expected))
    assert torch.equal(tower.model(**tower.embed(inputs), output_hidden_states=True).hidden_states[-1], states[-1])


def test_learned_positions_have_an_end_which_is_named(gpt2_folder):
    model = load_model(gpt2_folder)
    inputs = model.encode(["tell me how to brew tea", "what"], [None, None])
    longest = int(inputs.attention_mask.sum(1).max())
    room = 64 - longest + 1
    assert len(model.generate(inputs, room)) == 2 and model.overlong(inputs) is None
    with pytest.raises(UserError, match=rf"has 64 positions: a prompt of {longest} .*--max-new-tokens {room}` or less"):
        model.generate(inputs, room + 1)
    row, told = model.overlong(model.encode(["what", "what " * 80], [None, None]))
    assert row == 1 and "the model has 64 positions" in told


def test_rows_padded_on_the_left_start_at_position_zero(gpt2_folder):
    """GPT-2 learned its positions: a row that starts elsewhere has other states."""
    tower, plain = load_tower(gpt2_folder, 4), whole(gpt2_folder)
    texts = ["tell me how to brew tea please", "what", "is it a red circle"]
    inputs = tower.encode(texts, [None] * 3)
    states = [
        tower.forward(inputs, hidden_states=True).hidden_states[-1],
        tower.model(**tower.embed(inputs), output_hidden_states=True).hidden_states[-1],
    ]
    for row, real in enumerate(inputs.attention_mask.bool()):
        alone = plain(input_ids=inputs.input_ids[row, real][None], output_hidden_states=True).hidden_states[-1][0]
        for found in states:
            torch.testing.assert_close(found[row, real], alone)


def test_a_text_model_takes_no_picture(text_folder):
    with pytest.raises(ValueError, match="text alone, got 1 pictures"):
        load_tower(text_folder, 1).encode(["what is it"], [picture()])


def test_a_model_without_a_template_gets_the_plain_one(gpt2_folder):
    model = load_tower(gpt2_folder, 1)
    assert model.processor.tokenizer.chat_template == PLAIN_TEMPLATE
    assert model.prompt("tell me", has_image=False) == "User: tell me\n\nAssistant:"
    assert model.prompt("tell me", has_image=False, completion="no") == "User: tell me\n\nAssistant: no</s>"


def test_the_parts_of_a_mistral_chat_have_their_roles(text_folder):
    model = load_tower(text_folder, 1)
    model.processor.tokenizer = sentencepiece_like_tokenizer()
    model.processor.tokenizer.chat_template = MISTRAL_TEMPLATE
    inputs = model.encode(["tell me"], [None], completions=["no"])
    assert model.prompt("tell me", has_image=False, completion="no") == "<s>[INST] tell me [/INST]no</s>"
    ids, roles = inputs.input_ids[0].tolist(), inputs.roles[0].tolist()
    tokenizer = model.processor.tokenizer
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id and roles[-1] == TokenRole.COMPLETION
    spoken = [token for token, role in zip(ids, roles, strict=True) if role == TokenRole.USER]
    assert tokenizer.decode(spoken).strip() == "tell me"
