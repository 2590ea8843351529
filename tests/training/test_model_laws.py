"""The laws on a user's weights: a tick each for a model that keeps them, and a cross for one that does not."""

import pytest

from mm_cb.models import VisionModel
from mm_cb.models.qwen3_5 import Qwen35Model
from mm_cb.models.qwen_vl import QwenVLModel
from mm_cb.models.tower import LanguageTower
from mm_cb.training.model_laws import check_model
from tests.models.tiny import tiny


@pytest.mark.parametrize("kind", ["llava", "mistral3", "qwen3_5", "smolvlm"])
def test_every_law_is_kept(kind):
    found = check_model(tiny(kind))
    assert len(found) == 5 and all(one.ok for one in found), found


FAULTS = {
    "ids": (QwenVLModel, "end_of_turn", "<|vision_end|>", 4),
    "token types": (QwenVLModel, "token_arguments", lambda model, inputs: {}, 2),
    "positions": (QwenVLModel, "positions", lambda model, inputs: inputs.text_positions, 2),
    "pixels": (VisionModel, "options", {"do_normalize": False}, 0),
    "recurrence": (Qwen35Model, "run_block", LanguageTower.run_block, 3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_law_is_named(fault, monkeypatch):
    family, name, wrong, place = FAULTS[fault]
    monkeypatch.setattr(family, name, wrong)
    found = check_model(tiny("qwen3_5"))
    assert not found[place].ok, found
