import pytest

from mm_cb.training.adapter import add_adapter
from mm_cb.training.placement import KeptBlocks, lora_paths
from mm_cb.training.representations import TOKEN_TYPES, compare
from tests.tiny_llava import picture, tiny_llava

ROWS = (["what", "is it a red circle", "here"], [picture(0), None, picture(1)], ["no", "a blue square", "tea"])


@pytest.fixture
def model():
    model = tiny_llava(blocks=3)
    paths = lora_paths(model, [1], ["v_proj", "down_proj"])
    model = add_adapter(model, paths, KeptBlocks(3, True), r=4, lora_alpha=4, dropout=0.0)
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    model.model.eval()
    return model


def test_states_below_the_adapter_are_equal_and_those_above_are_not(model):
    found = compare(model, *ROWS)
    for kind in TOKEN_TYPES:
        values = found["tokens"][kind]
        assert values["cosine"][:2] == pytest.approx([1, 1], abs=1e-5) and values["cosine"][2] < 0.999
        assert values["norm_reference"][:2] == values["norm_adapted"][:2]
        assert values["norm_reference"][2] != values["norm_adapted"][2]
    assert {kind: found["tokens"][kind]["n"] for kind in TOKEN_TYPES} == {"image": 2, "prompt": 3, "completion": 3}


def test_the_size_of_a_batch_and_its_padding_change_nothing(model):
    whole, single = compare(model, *ROWS), compare(model, *ROWS, batch=1)
    for kind in TOKEN_TYPES:
        for key in ("cosine", "norm_reference", "norm_adapted"):
            assert whole["tokens"][kind][key] == pytest.approx(single["tokens"][kind][key], abs=1e-4)


def test_rows_without_a_picture_have_no_image_tokens(model):
    assert compare(model, *(part[1:2] for part in ROWS))["tokens"].keys() == {"prompt", "completion"}
