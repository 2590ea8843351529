"""Text models through the same trainer as LLaVA-NeXT."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train
from tests.models.conftest import save_text_model

LAYERS = ["circuit_breaker.target_layers=[1, 3]", "lora.layers_to_transform=[0, 1, 2]", "lora.r=2"]
SMALL = [
    "device=cpu",
    "dtype=float32",
    "training.max_steps=2",
    "training.batch_size=2",
    "training.held_out=2",
    "data=miniature",
]


@pytest.mark.parametrize(("name", "kind"), [("mistral-7b-instruct", "mistral"), ("gpt2", "gpt2")])
def test_a_text_recipe_trains_and_plain_peft_loads_the_adapter(name, kind, examples, tmp_path):
    base = save_text_model(tmp_path / kind, kind)
    out = train(load_recipe(name, [f"model={base}", *LAYERS, *SMALL]), tmp_path / "run", examples)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["modality"] for record in records] == ["text", "text"]
    weights = load_file(out / "adapter_model.safetensors")
    path = "model.layers" if kind == "mistral" else "transformer.h"
    assert {key.partition(f"base_model.model.{path}.")[2][0] for key in weights} == {"0", "1", "2"}
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([[5, 8, 9, 10, 11]])
    expected = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, out).eval()
    assert not torch.equal(adapted(ids).logits, expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, expected)
