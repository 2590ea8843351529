"""The adapter's switch does what PEFT's does, leaves what it found, and sees adapters that come later."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mm_cb.models.switch import adapter_off, only_dropout_of_adapter


@pytest.fixture
def model():
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    lora = LoraConfig(
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        lora_dropout=0.5,
    )
    return get_peft_model(GPT2LMHeadModel(config), lora).eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(10)[None]).logits


def test_off_is_what_peft_calls_off_and_on_again_is_on(model):
    on = logits(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    changed = logits(model)
    with model.disable_adapter():
        off = logits(model)
    with adapter_off(model), adapter_off(model):
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), changed) and not torch.equal(changed, on) and not torch.equal(changed, off)


def test_it_is_restored_after_an_error_and_trains_what_was_trained(model):
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.requires_grad_(False)
    before, on = [parameter.requires_grad for parameter in model.parameters()], logits(model)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_second_adapter_in_another_place_is_switched_too(model):
    with adapter_off(model):
        off = logits(model)
    model.add_adapter("second", LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True, init_lora_weights=False))
    model.set_adapter("second")
    assert not torch.equal(logits(model), off)
    with adapter_off(model):
        assert torch.equal(logits(model), off)


@pytest.mark.parametrize("on", [True, False])
def test_the_adapters_dropout_alone_is_active(on, model):
    model.train()
    only_dropout_of_adapter(model, on)
    active = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training]
    assert bool(active) == on and all("lora_dropout" in name for name in active)
    assert not any(module.training for name, module in model.named_modules() if "lora_dropout" not in name)
