import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlavaNextForConditionalGeneration, LlavaNextProcessor

from mm_cb.core.errors import UserError
from mm_cb.models import load_model, merging
from mm_cb.models.merging import merge
from tests.models.shapes import PUBLISHED, published, tensors
from tests.models.tiny import tiny
from tests.tiny_llava import picture, tiny_llava


def random_adapter(model, modules, path, base):
    wrapped = get_peft_model(model, LoraConfig(target_modules=modules, r=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(path, save_embedding_layers=False)
    fields = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": str(base)}))
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    blocks = "model.language_model.layers"
    modules = [f"{blocks}.1.self_attn.q_proj", f"{blocks}.2.mlp.down_proj"]
    return random_adapter(tiny_llava().model, modules, tmp_path_factory.mktemp("adapter"), folder)


def test_plain_transformers_opens_the_merged_model_with_the_adapters_logits(folder, adapter, tmp_path):
    assert merge(folder, adapter, tmp_path / "merged") == tmp_path / "merged"
    merged = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "merged")
    adapted = load_model(folder, adapter=adapter)
    text = adapted.prompt("what is it", has_image=True, completion="a square")
    inputs = processor(text=text, images=picture(), return_tensors="pt")
    logits, expected = merged(**inputs).logits, adapted.model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with adapted.adapter(enabled=False):
        assert (adapted.model(**inputs).logits - expected).abs().max() > 1e-2
    assert not list(tmp_path.glob(".*"))
    assert len({path.stat().st_mode for path in (tmp_path / "merged").iterdir()}) == 1  # weights are no secret


@pytest.mark.parametrize(
    ("kind", "converted"), [(kind, False) for kind in PUBLISHED] + [("llava_next", True), ("llava", True)]
)
def test_a_merged_model_has_the_published_names_whatever_those_of_its_base(kind, converted, tmp_path):
    base = tmp_path / "base"
    model = tiny(kind)
    model.base.save_pretrained(base, save_original_format=converted)  # True: transformers 5; False: as in memory
    model.processor.save_pretrained(base)
    adapter = random_adapter(model.base, [f"{model.language_path}.1.mlp.up_proj"], tmp_path / "adapter", base)
    assert published(tensors(base), kind) != PUBLISHED[kind] or kind == "qwen3_vl"
    merge(base, adapter, tmp_path / "merged")
    assert published(tensors(tmp_path / "merged"), kind) == PUBLISHED[kind]


def test_gpt2s_transposed_layers_merge_too(gpt2_folder, tmp_path):
    modules = ["transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_proj"]
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    adapter = random_adapter(base, modules, tmp_path / "adapter", gpt2_folder)
    merge(gpt2_folder, adapter, tmp_path / "merged")
    ids = torch.tensor([[5, 8, 9, 10]])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_folder), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_small_change_survives_a_coarse_dtype(folder, adapter, tmp_path):
    merge(folder, adapter, tmp_path / "merged", dtype="bfloat16")
    exact, coarse = load_model(folder, adapter=adapter).base, load_model(tmp_path / "merged", dtype="bfloat16").base
    layer = exact.model.language_model.layers[1].self_attn.q_proj
    weight = (layer.weight.bfloat16().float() + layer.get_delta_weight("default")).bfloat16()
    assert torch.equal(coarse.model.language_model.layers[1].self_attn.q_proj.weight, weight)


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", [(LlavaNextProcessor, "save_pretrained"), (merging, "_sync")])
def test_half_a_checkpoint_never_looks_finished(broken, folder, adapter, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    with monkeypatch.context() as patched:
        patched.setattr(*broken, full_disk)
        with pytest.raises(UserError, match="disk is full"):
            merge(folder, adapter, out)
    assert not list(tmp_path.iterdir())
    merge(folder, adapter, out)
    load_model(out)


def test_of_two_merges_at_once_one_writes_and_the_other_is_told(folder, adapter, tmp_path, monkeypatch):
    out, told, load = tmp_path / "merged", [], merging.load_plain

    def beside(*given, **more):
        with pytest.raises(UserError, match="merged` is in use by another mm-cb process"):
            merge(folder, adapter, out)
        told.append(out.exists())
        return load(*given, **more)

    (tmp_path / ".merged.part" / "left").mkdir(parents=True)  # by one that was killed
    monkeypatch.setattr(merging, "load_plain", beside)
    merge(folder, adapter, out)
    assert told == [False] and not (out / "left").exists() and [*tmp_path.iterdir()] == [out]
    monkeypatch.undo()
    with pytest.raises(UserError, match="must be new or an empty directory"):
        merge(folder, adapter, out)


def test_a_folder_that_holds_something_is_left_alone(folder, adapter, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="must be new or an empty directory"):
        merge(folder, adapter, tmp_path)
    assert (tmp_path / "mine").read_text() == "x"
