"""Every model of transformers that sees is one of ours or is refused by its type, with a reason of its own."""

import json

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.models.families import read_config
from mm_cb.models.refusals import _BY_TYPE
from mm_cb.models.registry import family_of, family_types
from tests import test_families_end_to_end as end_to_end
from tests.models import laws
from tests.models.test_family_laws import LARGE_GEMMA4
from tests.models.tiny import tiny

REASONS = {
    "mllama": "cross attention",
    "idefics": "cross attention",
    "gemma4_unified": "it is no gemma4",
    "chameleon": "codebook",
    "qwen3_vl_moe": "experts",
    "florence2": "an encoder reads",
    "instructblip": "Q-Former",
    "deepseek_vl": "no law here has been run on it",
}


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_is_said(kind):
    with pytest.raises(UserError, match=f"got {kind}; .* Of {kind}: .*{REASONS[kind]}"):
        family_of(AutoConfig.for_model(kind), "x")


def test_the_reason_is_said_of_published_files_before_any_number_of_them(tmp_path):
    """Llama 3.2's stands for pictures by a token behind its vocabulary."""
    config = AutoConfig.for_model("mllama")
    assert config.image_token_index == config.text_config.vocab_size
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="got mllama; .*cross attention"):
        read_config(tmp_path)


def test_no_type_is_taken_for_another_and_no_reason_is_left_over():
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert set(_BY_TYPE) <= known - set(family_types())
    for kind in known - {one for one in family_types() if "+" not in one}:
        with pytest.raises(UserError, match=r"got \S+; .* Of \S+: .{9,}\.$"):
            family_of(AutoConfig.for_model(kind), "x")


UNCHECKED = {
    ("mistral3", "ministral3"): {},
    ("llava+pixtral", "ministral3"): {},
    ("internvl", "gpt_oss"): {},
    ("internvl", "qwen3_moe"): {},
    ("llava", "mixtral"): {},
    ("smolvlm", "qwen2"): {},
    ("gemma4", "enable_moe_block"): {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    ("gemma4", "use_bidirectional_attention"): {"use_bidirectional_attention": "all"},
    ("gemma3", "use_bidirectional_attention"): {"use_bidirectional_attention": True},
    ("gemma3", "final_logit_softcapping"): {"final_logit_softcapping": 30.0},
    ("gemma3", "attn_logit_softcapping"): {"attn_logit_softcapping": 50.0},
}
"""Towers and settings of a family's models under which no law was run; a part of what is said."""


def unchecked(kind, said):
    fields = UNCHECKED[kind, said]
    text = fields or {"model_type": said}
    kind, _, sees = kind.partition("+")
    return AutoConfig.for_model(kind, text_config=text, **({"vision_config": {"model_type": sees}} if sees else {}))


@pytest.mark.parametrize(("kind", "said"), UNCHECKED)
def test_a_language_tower_that_no_law_was_run_on_is_refused(kind, said):
    with pytest.raises(UserError, match=rf"`x` .*[`.]{said}`.* checked with") as refused:
        family_of(unchecked(kind, said), "x")
    assert ("experts" in str(refused.value)) == (said in ("qwen3_moe", "gpt_oss", "mixtral"))


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "mistral3"])
def test_what_the_laws_were_run_on_is_taken(kind):
    assert family_of(tiny(kind).base.config).__name__ == {"mistral3": "Mistral3Model"}.get(kind, f"G{kind[1:]}Model")
    if kind == "gemma4":
        assert family_of(tiny(kind, **LARGE_GEMMA4).base.config)


def test_every_command_refuses_it_in_one_line(tmp_path, capsys):
    laws.saved(tiny("mistral3"), tmp_path / "model")
    held = json.loads((tmp_path / "model" / "config.json").read_text())
    held["text_config"]["model_type"] = "ministral3"
    (tmp_path / "model" / "config.json").write_text(json.dumps(held))
    data = end_to_end.write_lines(tmp_path / "rows.jsonl", end_to_end.rows(tmp_path))
    behaviors = end_to_end.write_lines(tmp_path / "behaviors.jsonl", end_to_end.BEHAVIORS)
    asked = end_to_end.write_lines(tmp_path / "asked.jsonl", [{"id": "1", "prompt": "what is"}])
    model, out = ["--model", tmp_path / "model"], ["--out", tmp_path / "out"]
    settings = [f"model={tmp_path / 'model'}", f"data=[{data}]"]
    capsys.readouterr()
    for words in (
        ["train", "miniature", "--dry-run", *settings],
        ["train", "miniature", *out, *settings],
        ["attack", *model, "--behaviors", behaviors, "--attack", "pgd", "--steps", 1, *out],
        ["eval", "over-refusal", *model, "--data", asked, *out],
        ["doctor", *model],
        ["doctor", *model, "--laws"],
    ):
        assert cli.run([str(word) for word in words]) == 2, words
        came = capsys.readouterr()
        told = [line for line in (came.err or came.out).splitlines() if "ministral3" in line]
        assert len(told) == 1 and "checked with `mistral`" in told[0], (words, came)
