"""Every model of transformers that sees is one of ours or is refused by its type, with a reason of its own."""

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_cb.core.errors import UserError
from mm_cb.models.refusals import _BY_TYPE
from mm_cb.models.registry import family_of, family_types

REASONS = {
    "mllama": "cross attention",
    "idefics": "cross attention",
    "gemma4_unified": "it is no gemma4",
    "chameleon": "codebook",
    "qwen3_vl_moe": "experts",
    "florence2": "an encoder reads",
    "instructblip": "Q-Former",
    "aya_vision": "no law here has been run on it",
}


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_is_said(kind):
    with pytest.raises(UserError, match=f"got {kind}; .* Of {kind}: .*{REASONS[kind]}"):
        family_of(AutoConfig.for_model(kind), "x")


def test_no_type_is_taken_for_another_and_no_reason_is_left_over():
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert set(_BY_TYPE) <= known - set(family_types())
    for kind in known - {one for one in family_types() if "+" not in one}:
        with pytest.raises(UserError, match=r"got \S+; .* Of \S+: .{9,}\.$"):
            family_of(AutoConfig.for_model(kind), "x")
