import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mm_cb.core.errors import UserError
from mm_cb.models import TokenRole, load_model
from mm_cb.models.llava_next import LlavaNextModel
from tests.tiny_llava import picture, tiny_llava


@pytest.fixture(scope="module")
def tiny():
    return tiny_llava()


@pytest.fixture
def folder(tmp_path, tiny):
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def adapted(tiny_model):
    paths = [f"{tiny_model.language_path}.{block}.self_attn.q_proj" for block in (1, 2)]
    model = get_peft_model(tiny_model.base, LoraConfig(target_modules=paths, r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return LlavaNextModel(model.eval(), tiny_model.processor)


def test_the_miniature_layout_has_three_tiles_and_thirty_image_tokens(tiny):
    inputs = tiny.encode(["what is it"], [picture()])
    assert inputs.pixel_values.shape == (1, 3, 3, 42, 42)
    assert inputs.beside["image_sizes"].tolist() == [[42, 84]]
    assert (inputs.roles == TokenRole.IMAGE).sum() == 30


def test_roles_name_every_token(tiny):
    inputs = tiny.encode(["tell me"], [None], completions=["no i can not"])
    words = tiny.processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    assert words == ["[INST]", "tell", "me", "[/INST]", "no", "i", "can", "not", "</s>"]
    assert inputs.roles[0].tolist() == [0, 1, 1, 0, 2, 2, 2, 2, 2]
    assert inputs.completion_mask[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert (inputs.labels[0] != -100).tolist() == [False] * 4 + [True] * 5


def test_an_open_completion_has_no_end_token(tiny):
    inputs = tiny.encode(["tell me"], [None], completions=["no i"], close_turn=False)
    assert tiny.processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0])[-1] == "i"


def test_the_ids_are_those_of_the_processor(tiny):
    text = tiny.prompt("what is it", has_image=True, completion="a square")
    expected = tiny.processor(text=text, images=picture(), return_tensors="pt")
    inputs = tiny.encode(["what is it"], [picture()], completions=["a square"])
    assert torch.equal(inputs.input_ids, expected["input_ids"])
    assert torch.equal(inputs.pixel_values, expected["pixel_values"])
    assert torch.equal(inputs.beside["image_sizes"], expected["image_sizes"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(tiny, side):
    texts, images = ["what is it", "tell me how to brew tea please"], [picture(), None]
    both = tiny.encode(texts, images, padding_side=side)
    logits = tiny.forward(both).logits
    for i in range(2):
        alone = tiny.forward(tiny.encode(texts[i : i + 1], images[i : i + 1])).logits[0]
        torch.testing.assert_close(logits[i][both.attention_mask[i] == 1], alone, rtol=1e-4, atol=1e-4)


def test_generation_does_not_depend_on_the_batch(tiny):
    texts, images = ["what is it", "tell me how to brew tea please", "a"], [picture(), None, picture(1)]
    together = tiny.generate(tiny.encode(texts, images), 8)
    alone = [tiny.generate(tiny.encode([t], [i]), 8)[0] for t, i in zip(texts, images, strict=True)]
    assert together == alone


def test_the_teacher_forced_argmax_is_what_generate_writes(tiny):
    prompt = tiny.encode(["what is it"], [picture()])
    completion = tiny.generate(prompt, 6)[0]
    forced = tiny.encode(["what is it"], [picture()], completions=[completion], close_turn=False)
    where = forced.completion_mask[0].nonzero()[:, 0]
    predicted = tiny.forward(forced).logits[0, where - 1].argmax(-1)
    assert torch.equal(predicted, forced.input_ids[0, where])


def test_right_padded_prompts_are_not_generated_from(tiny):
    with pytest.raises(ValueError, match="left"):
        tiny.generate(tiny.encode(["a", "a red square"], [None, None], padding_side="right"), 2)


def test_the_gradient_reaches_the_pixels_and_no_parameter(tiny):
    inputs = tiny.encode(["what is it"], [picture()])
    pixels = inputs.pixel_values.clone().requires_grad_()
    output = tiny.forward(inputs, pixel_values=pixels, logits_to_keep=1, hidden_states=True)
    assert output.logits.shape[1] == 1 and len(output.hidden_states) == len(tiny.decoder_blocks) + 1
    output.logits.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_differentiable_preprocessing_is_the_processors(tiny):
    inputs = tiny.encode(["what is it"], [picture()])
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255
    assert torch.equal(tiny.preprocessing((42, 84))(pixels), inputs.pixel_values)


def test_a_chat_with_the_wrong_number_of_pictures(tiny):
    with pytest.raises(ValueError, match="2 pictures must have as many image parts, got 1"):
        tiny.encode_chats(
            [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]],
            [[picture(), picture()]],
        )


def test_the_adapter_changes_the_output_and_off_is_the_base_bit_for_bit():
    plain, wrapped = tiny_llava(), adapted(tiny_llava())
    inputs = plain.encode(["what is it"], [picture()])
    base = plain.forward(inputs).logits
    on = wrapped.forward(inputs).logits
    assert not torch.equal(on, base)
    with pytest.raises(RuntimeError, match="inside"), wrapped.adapter(enabled=False):
        assert torch.equal(wrapped.forward(inputs).logits, base)
        raise RuntimeError("inside")
    assert torch.equal(wrapped.forward(inputs).logits, on)
    with plain.adapter(enabled=False):
        assert torch.equal(plain.forward(inputs).logits, base)
    assert wrapped.language_path == plain.language_path == "model.language_model.layers"
    assert len(wrapped.decoder_blocks) == 3


@pytest.mark.parametrize("trainable", [True, False])
def test_switching_the_adapter_leaves_what_trains_as_it_was(trainable):
    wrapped = adapted(tiny_llava())
    if not trainable:
        wrapped.model.requires_grad_(False)
    before = [name for name, p in wrapped.model.named_parameters() if p.requires_grad]
    with wrapped.adapter(enabled=False):
        pass
    assert [name for name, p in wrapped.model.named_parameters() if p.requires_grad] == before
    assert bool(before) == trainable


def test_embed_is_where_the_language_tower_starts(tiny):
    inputs = tiny.encode(["what is it", "tell me please"], [picture(), None], padding_side="right")
    expected = tiny.forward(inputs, hidden_states=True)
    embedded = tiny.embed(inputs)
    assert torch.equal(embedded["inputs_embeds"], expected.hidden_states[0])
    assert torch.equal(tiny.model(**embedded).logits, expected.logits)


@pytest.mark.parametrize("final_norm", [True, False])
def test_a_cut_model_has_the_hidden_states_of_the_whole_one(final_norm):
    whole, cut = tiny_llava(blocks=4), tiny_llava(blocks=4)
    inputs = whole.encode(["what is it"], [picture()])
    expected = whole.forward(inputs, hidden_states=True).hidden_states
    cut.keep_blocks(2, final_norm=final_norm)
    states = cut.forward(inputs, hidden_states=True).hidden_states
    assert len(states) == 3 and len(cut.decoder_blocks) == 2
    assert torch.equal(states[0], expected[0]) and torch.equal(states[1], expected[1])
    last = whole.base.model.language_model.norm(expected[2]) if final_norm else expected[2]
    assert torch.equal(states[2], last)


def test_a_model_without_a_known_language_tower_says_what_it_has(tiny):
    with pytest.raises(ValueError, match=r"lists at \['0'\]"):
        _ = LlavaNextModel(torch.nn.Sequential(torch.nn.ModuleList()), tiny.processor).language_path


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_load_model_gives_the_saved_model_frozen(folder, tiny, backend):
    loaded = load_model(folder, image_backend=backend)
    inputs = tiny.encode(["what is it"], [picture()])
    assert torch.equal(loaded.forward(inputs).logits, tiny.forward(inputs).logits)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert type(loaded.processor.image_processor).__name__.endswith("Pil") == (backend == "pil")


def test_load_model_with_an_adapter(folder, tmp_path, tiny):
    wrapped = adapted(tiny_llava())
    wrapped.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    inputs = tiny.encode(["what is it"], [picture()])
    frozen = load_model(folder, adapter=tmp_path / "adapter")
    assert torch.equal(frozen.forward(inputs).logits, wrapped.forward(inputs).logits)
    assert not any(p.requires_grad for p in frozen.model.parameters())
    trainable = load_model(folder, adapter=tmp_path / "adapter", trainable=True)
    assert {n.split(".")[-3] for n, p in trainable.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_what_is_not_there_is_the_users_error(folder, tmp_path):
    with pytest.raises(UserError, match="must be a folder, which is not here, or a name on the hub"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not an adapter"):
        load_model(folder, adapter=tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors` must be a (whole )?safetensors file"):
        load_model(folder)


def test_an_adapter_of_another_model_is_the_users_error(folder, tmp_path):
    wrapped = adapted(tiny_llava())
    wrapped.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = ["model.language_model.layers.9.self_attn.q_proj"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit"):
        load_model(folder, adapter=tmp_path / "adapter")
