import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from mm_cb.core.errors import UserError
from mm_cb.models import quantization
from mm_cb.models.quantization import assert_kept, four_bit
from tests.tiny_llava import tiny_llava

KEPT = ("vision_tower", "multi_modal_projector", "lm_head")


class Params4bit(torch.nn.Parameter):
    """Stands for bitsandbytes' class of this name."""


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: ModuleSpec(name, None))


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def quantise(model, names):
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = Params4bit(layer.weight.data, requires_grad=False)
    return model


@pytest.mark.parametrize("part", ["whole", "headless"])
def test_transformers_quantises_exactly_the_decoder_blocks(part, installed):
    config = four_bit(torch.bfloat16, KEPT)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    whole = tiny_llava().base
    model = whole if part == "whole" else whole.model
    names = [name for name in linear_names(model) if should_convert_module(name, config.llm_int8_skip_modules)]
    assert len(names) == 7 * 3 and all("language_model.layers" in name for name in names)
    assert_kept(quantise(model, names), KEPT)


@pytest.mark.parametrize("path", ["model.vision_tower", "model.multi_modal_projector", "lm_head"])
def test_what_must_stay_unquantised_is_checked(path):
    model = tiny_llava().base
    wrong = next(name for name in linear_names(model) if name.startswith(path))
    with pytest.raises(RuntimeError, match=f"must stay unquantised, got .*{path}"):
        assert_kept(quantise(model, [wrong]), KEPT)


def test_a_model_that_was_not_quantised_is_noticed():
    with pytest.raises(RuntimeError, match="must be quantised, no module is"):
        assert_kept(tiny_llava().base, KEPT)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[quant\]'"):
        four_bit(torch.float32, KEPT)
