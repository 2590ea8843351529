import io
import json
import socket
import ssl
import urllib.request
from email.message import Message
from urllib.error import HTTPError, URLError

import datasets.config
import huggingface_hub
import pytest
import torch
import transformers.modeling_utils
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from mm_cb.attacks.quick_look import shape_of
from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.packages import stay_offline_without_network
from mm_cb.models import TextModel, load_model, load_tower
from mm_cb.models.families import load_processor, read_config
from mm_cb.models.llava_next import LlavaNextModel
from tests.models.shapes import LLAVA_TEMPLATE, new, old, relayout, tensors
from tests.tiny_llava import picture, tiny_llava

BLOCKS = 6


@pytest.fixture(scope="module")
def tiny():
    return tiny_llava(blocks=BLOCKS)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """In several shards, as a large model is."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny.model.save_pretrained(path, max_shard_size="60KB")
    tiny.processor.save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture
def inputs(tiny):
    return tiny.encode(["what is it", "tell me how to brew tea"], [picture(), None])


@pytest.fixture
def read_tensors(monkeypatch):
    """Names of the tensors whose content is read from safetensors files, and how many numbers."""
    read = {}
    real = transformers.modeling_utils.safe_open

    class Slice:
        def __init__(self, key, slice_):
            self.key, self.slice = key, slice_

        def __getitem__(self, index):
            value = self.slice[index]
            read[self.key] = value.numel()
            return value

        def __getattr__(self, name):
            return getattr(self.slice, name)

    class File:
        def __init__(self, *arguments, **options):
            self.file = real(*arguments, **options)

        def get_slice(self, key):
            return Slice(key, self.file.get_slice(key))

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __exit__(self, *error):
            return self.file.__exit__(*error)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    return read


@pytest.mark.parametrize("rename", [old, new])
def test_every_layout_of_keys_gives_equal_logits(rename, folder, tiny, inputs, tmp_path):
    keys = set(map(rename, tensors(folder)))
    assert any(".vision_model." in key for key in keys)
    prefix = "language_model.model.layers." if rename is old else "model.language_model.layers."
    assert f"{prefix}0.mlp.up_proj.weight" in keys
    copy = relayout(folder, tmp_path / "copy", rename)
    assert torch.equal(load_model(copy).forward(inputs).logits, tiny.forward(inputs).logits)
    states = load_tower(copy, 2).forward(inputs, hidden_states=True).hidden_states
    assert torch.equal(states[1], tiny.forward(inputs, hidden_states=True).hidden_states[1])


def test_a_missing_tensor_is_an_error_and_no_random_weight(folder, tmp_path):
    copy = relayout(folder, tmp_path / "copy", lambda key: key)
    kept = {key: value for key, value in tensors(copy).items() if "layers.1.mlp.up_proj" not in key}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    for load in (load_model, lambda path: load_tower(path, 3)):
        with pytest.raises(UserError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
            load(copy)
    load_tower(copy, 1)  # which has no such block


@pytest.mark.parametrize("blocks", [1, 3, BLOCKS])
def test_a_tower_has_the_hidden_states_of_the_whole_model(blocks, folder, tiny, inputs):
    tower = load_tower(folder, blocks)
    assert isinstance(tower, LlavaNextModel) and tower.language_path == "model.language_model.layers"
    tower.keep_blocks(blocks, final_norm=blocks == BLOCKS)
    states = tower.forward(inputs, hidden_states=True).hidden_states
    expected = tiny.forward(inputs, hidden_states=True).hidden_states
    assert len(states) == blocks + 1 and all(map(torch.equal, states, expected))
    assert torch.equal(states[-1], expected[blocks])  # also the last one: the block's raw output, not the normed one


def test_a_tower_reads_only_what_it_keeps(folder, read_tensors):
    tower = load_tower(folder, 2)
    blocks = {key.split(".layers.")[1].split(".")[0] for key in read_tensors if "language_model.model.layers" in key}
    assert blocks == {"0", "1"}
    assert not [key for key in read_tensors if "lm_head" in key]
    assert sum(read_tensors.values()) == sum(p.numel() for p in tower.model.parameters())
    assert not any(p.is_meta or p.requires_grad for p in tower.model.parameters())
    whole = sum(value.numel() for value in tensors(folder).values())
    assert sum(read_tensors.values()) < 0.7 * whole


def test_a_tower_cuts_long_rows_but_no_image(folder):
    tower = load_tower(folder, 1)
    tower.max_length = 6
    texts = ["tell me how to brew tea please"] * 2
    inputs = tower.encode(texts, [picture(), None], padding_side="right")
    assert inputs.attention_mask.sum(-1).tolist() == [6 + int((inputs.roles[0] == 3).sum()), 6]
    two = [
        {"role": "user", "content": [{"type": "text", "text": texts[0]}]},
        {"role": "assistant", "content": "no"},
    ] * 2
    two[2] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "it"}]}
    with pytest.raises(ValueError, match="`max_length` 6 must leave every image"):
        tower.encode_chats([two], [[picture()]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention, folder, tiny, inputs):
    loaded = load_model(folder, attention=attention)
    assert loaded.base.config.text_config._attn_implementation == attention
    real = inputs.attention_mask.bool()
    logits, expected = (model.forward(inputs).logits[real] for model in (loaded, tiny))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_that_is_not_there(folder):
    with pytest.raises(UserError, match="flash-attn package"):
        load_model(folder, attention="flash_attention_2")


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_dtype_and_device_map(device, folder):
    loaded = load_model(folder, dtype="bfloat16", device=device)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.encode(["what is it"], [picture()]).input_ids.device == loaded.device


def test_a_text_model_is_loaded_whole_or_cut_and_takes_no_picture(text_folder):
    model = load_model(text_folder)
    assert isinstance(model, TextModel) and isinstance(load_tower(text_folder, 1), TextModel)
    for ask in (lambda: model.canvas, lambda: model.preprocessing((8, 8)), lambda: model.image_features(None)):
        with pytest.raises(UserError, match="is a model of text alone"):
            ask()


def test_a_model_that_sees_and_whose_family_is_not_here_is_refused_by_name(folder, tmp_path):
    for kind in ("idefics2", "t5"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            UserError, match=f"one of the families .*llava, .*llava_next, .*, got {kind}; docs/add_a_model.md"
        ):
            load_model(tmp_path)


def test_the_wrong_end_token_of_old_templates_is_mended(folder, tiny, tmp_path):
    tiny.processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAVA_TEMPLATE.replace("</s>", "<\\s>"))
    model = LlavaNextModel(tiny.model, load_processor(tmp_path, read_config(folder)))
    text = model.prompt("what is it", has_image=True, completion="tea")
    assert text == "[INST] <image>\nwhat is it [/INST] tea</s>"


def test_a_tokenizer_that_was_not_read_is_noticed(folder, tmp_path):
    config = read_config(folder)
    config.text_config.vocab_size = 32064
    with pytest.raises(UserError, match=r"has \d+ tokens, its model 32064"):
        load_processor(folder, config)


def saved_adapter(path, base_name):
    wrapped = tiny_llava(blocks=BLOCKS).model
    wrapped = get_peft_model(wrapped, LoraConfig(target_modules=["model.language_model.layers.1.mlp.up_proj"], r=2))
    wrapped.save_pretrained(path, save_embedding_layers=False)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base_name}))
    return path


def test_an_adapter_of_another_base_names_both(folder, tmp_path):
    for name in (str(folder), "some/where/model/", "", None):  # the same, a copy of it, unknown
        load_model(folder, adapter=saved_adapter(tmp_path / "fits", name))
    adapter = saved_adapter(tmp_path / "other", "llava-hf/llava-v1.6-vicuna-7b-hf")
    with pytest.raises(UserError, match="trained for `llava-hf/llava-v1.6-vicuna-7b-hf`, the model is `.*model`"):
        load_model(folder, adapter=adapter)


@pytest.mark.parametrize("config", ["[1]", "{", '{"base_model_name_or_path": 5}', "{}"])
def test_an_adapter_whose_configuration_is_damaged(folder, tmp_path, config):
    adapter = saved_adapter(tmp_path / "adapter", str(folder))
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=r"adapter/adapter_config\.json"):
        load_model(folder, adapter=adapter)


@pytest.mark.parametrize(
    ("answer", "offline"),
    [
        (None, False),
        (HTTPError("u", 404, "from the hub", Message(), None), False),
        (HTTPError("u", 503, "from a proxy", Message(), None), True),
        (URLError(socket.gaierror("Name or service not known")), True),
        (URLError(OSError("Tunnel connection failed: 403 Forbidden")), True),
        (URLError(ssl.SSLCertVerificationError("unable to get local issuer certificate")), False),
        (TimeoutError("timed out"), True),
    ],
)
def test_a_model_that_is_not_here_is_one_quick_error_without_network(monkeypatch, answer, offline):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, request.method))
        if answer is not None:
            raise answer
        return io.BytesIO()

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    stay_offline_without_network.cache_clear()
    try:
        if offline:
            for _ in range(2):
                with pytest.raises(UserError, match="hf download nobody/nothing"):
                    read_config("nobody/nothing-of-this-name")
        else:
            stay_offline_without_network()
        assert asked == [(huggingface_hub.constants.ENDPOINT, "HEAD")]
        assert huggingface_hub.is_offline_mode() == datasets.config.HF_HUB_OFFLINE == offline
    finally:
        stay_offline_without_network.cache_clear()


@pytest.mark.parametrize("name", ["miniature", "folder"])
def test_nobody_is_asked_about_a_model_that_is_here(name, folder, monkeypatch):
    def urlopen(request, timeout):
        raise AssertionError("the hub was asked about a local model")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    stay_offline_without_network.cache_clear()
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert read_config(folder if name == "folder" else name).model_type == "llava_next"


@pytest.mark.parametrize("name", ["Miniature", "MINIATURE", "miniatur", "miniature_agent"])
def test_a_misspelled_guest_is_named_before_the_hub_is_asked(name, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "fetch", fetch)
    for ask in (load_model, read_config, shape_of):
        with pytest.raises(UserError, match=f"`{name}` is no folder here, did you mean `miniature"):
            ask(name)
    with pytest.raises(AssertionError):
        read_config(f"somebody/{name}")


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0", "nonsense", "CPU", "cuda:-1", "cuda:01", "cpu:0", " cpu"])
def test_other_devices_are_refused_in_one_line(device, folder):
    for load in (load_model, lambda name, device: load_tower(name, 1, device=device)):
        with pytest.raises(UserError, match=f"must be cpu, cuda, cuda:N or auto, got '{device}'"):
            load(folder, device=device)
