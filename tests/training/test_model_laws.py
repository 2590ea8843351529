"""The laws on a user's weights: a tick each for a model that keeps them, and a cross for one that does not."""

import pytest
import torch

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from mm_cb.models import VisionModel
from mm_cb.models.gemma3 import Gemma3Model
from mm_cb.models.qwen3_5 import Qwen35Model
from mm_cb.models.qwen_vl import QwenVLModel
from mm_cb.models.tower import LanguageTower
from mm_cb.training.model_laws import check_model, refuse_broken
from tests.models import laws
from tests.models.test_family_laws import LARGE_GEMMA4
from tests.models.tiny import KINDS, tiny
from tests.tiny_llava import picture


@pytest.fixture(autouse=True)
def trusted_templates(monkeypatch):
    """Ours are not a stranger's: to run each in a process of its own first is tested elsewhere, and costs seconds."""
    monkeypatch.setattr("mm_cb.models.templates._run_apart", lambda told: None)


def built(kind):
    """A tiny model; the large Gemma 4 are built otherwise than the small ones."""
    return tiny("gemma4", **LARGE_GEMMA4) if kind == "large gemma4" else tiny(kind)


@pytest.mark.parametrize("kind", [*KINDS, "large gemma4"])
def test_every_law_is_kept(kind):
    found = check_model(built(kind))
    assert len(found) == 5 and all(one.ok for one in found), found


@pytest.mark.parametrize("kind", [*KINDS, "large gemma4"])
def test_the_attack_command_takes_every_family(kind, tmp_path):
    laws.saved(built(kind), tmp_path / "model")
    picture(0, (84, 42)).save(tmp_path / "a.png")
    (tmp_path / "b.jsonl").write_text('{"id": "a", "prompt": "what", "target": "it is", "image": "a.png"}\n')
    for name in ("pgd", "universal"):
        out = tmp_path / name
        asked = ["attack", "--model", tmp_path / "model", "--behaviors", tmp_path / "b.jsonl", "--out", out]
        settings = ["--attack", name, "--steps", 2, "--max-new-tokens", 1]
        assert cli.run([str(word) for word in [*asked, *settings]]) == 0
        (item,) = read_jsonl(out / "items.jsonl")
        assert (out / item["image"]).is_file() and "zero_gradients" not in item["candidates"][0]


def test_an_answer_that_nothing_ends_is_not_called_ended_by_a_word():
    assert check_model(tiny("llava"))[4].detail == "no token ends an answer in this template"
    assert check_model(tiny("llava_next"))[4].detail == "`</s>`"


FAULTS = {
    "ids": (QwenVLModel, "end_of_turn", "<|vision_end|>", 4),
    "token types": (QwenVLModel, "token_arguments", lambda model, inputs: {}, 2),
    "positions": (QwenVLModel, "positions", lambda model, inputs: inputs.text_positions, 2),
    "pixels": (VisionModel, "options", {"do_normalize": False}, 0),
    "recurrence": (Qwen35Model, "run_block", LanguageTower.run_block, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_law_is_named(fault, dtype, monkeypatch):
    family, name, wrong, place = FAULTS[fault]
    monkeypatch.setattr(family, name, wrong)
    found = check_model(in_type(dtype, tiny("qwen3_5")))
    assert not found[place].ok, found


def in_type(dtype, model):
    model.model.to(dtype)
    return model


def test_what_moves_the_tokens_of_pictures_alone_is_noticed_in_few_bits(monkeypatch):
    """Of Gemma 3 without token types; the last tokens' logits move by 3 % of the largest, which rounding may do too."""
    monkeypatch.setattr(Gemma3Model, "token_arguments", lambda model, inputs: {})
    found = check_model(in_type(torch.bfloat16, tiny("gemma3", seed=4)))
    assert not found[2].ok, found


def test_few_bits_through_many_blocks_break_no_law():
    """A single token may go far astray in random blocks, all of them do not."""
    found = check_model(in_type(torch.bfloat16, tiny("llava", num_hidden_layers=32)))
    assert all(kept.ok for kept in found), found


def test_the_command_ticks_every_law_and_ends_with_2_where_one_breaks(monkeypatch, capsys, tmp_path):
    laws.saved(tiny("llava"), tmp_path / "model")
    asked = ["doctor", "--model", str(tmp_path / "model"), "--laws"]
    assert cli.run(asked) == 0 and "PROBLEM" not in capsys.readouterr().out
    monkeypatch.setattr(VisionModel, "options", {"do_normalize": False})
    assert cli.run(asked) == 2
    said = capsys.readouterr()
    assert "PROBLEM" in said.out and "of 5 laws, so that no number" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("fault", ["ids", "positions"])
def test_a_model_that_breaks_a_law_is_not_attacked(fault, monkeypatch, capsys, tmp_path):
    laws.saved(tiny("qwen2_5_vl"), tmp_path / "model")
    (tmp_path / "b.jsonl").write_text('{"id": "a", "prompt": "what", "target": "it is", "image": null}\n')
    asked = ["attack", "--model", str(tmp_path / "model"), "--behaviors", str(tmp_path / "b.jsonl"), "--steps", "1"]
    monkeypatch.setattr(*FAULTS[fault][:3])
    assert cli.run([*asked, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    law = {"ids": "an answer ends in a token at which generation stops", "positions": "logits are the model's own"}
    assert f"breaks a law of its family ({law[fault]}" in said
    assert "doctor --model" in said and not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("kind", ["llava", "qwen3_5"])
def test_rotary_angles_of_few_bits_are_noticed(kind, monkeypatch):
    exact = LanguageTower.block_arguments

    def rounded(model, rows):
        given = exact(model, rows)
        return given | {"position_embeddings": tuple(one.half().float() for one in given["position_embeddings"])}

    monkeypatch.setattr(LanguageTower, "block_arguments", rounded)
    assert [kept.ok for kept in check_model(tiny(kind))] == [True, True, True, False, True]


def test_logits_that_are_no_number_are_no_ones():
    model = tiny("llava")
    model.base.lm_head.weight[0, 0] = torch.nan
    assert "nan" in check_model(model)[2].detail and not check_model(model)[2].ok


def test_a_law_that_names_the_users_file_says_it_in_plain_words(monkeypatch):
    model = tiny("llava")
    monkeypatch.setattr(type(model), "stops", lambda _: refuse("`eos_token_id` must hold tokens."))
    with pytest.raises(UserError, match=r"breaks a law .*\): `eos_token_id` must hold tokens; no number"):
        refuse_broken(model)


def refuse(said):
    raise UserError(said)


def test_a_law_that_memory_is_too_small_for_is_not_a_broken_one(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny("llava")
    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        refuse_broken(model)


def test_laws_are_asked_of_a_model(capsys):
    assert cli.run(["doctor", "--laws"]) == 2
    assert "`--laws` asks a model" in capsys.readouterr().err
