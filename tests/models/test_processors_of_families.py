"""Processors that are not the model's, and pictures that a family cannot show, are refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_run
from mm_cb.inference.served import open_engine
from mm_cb.inference.source import ModelSource, source_again
from mm_cb.inference.subjects import load_subject
from tests.models import laws
from tests.models.tiny import tiny
from tests.tiny_llava import picture

WRONG = {
    "tokens of a tile": ("smolvlm", lambda p: setattr(p, "image_seq_len", 9), "`image_seq_len` 4"),
    "tiles": (
        "smolvlm",
        lambda p: setattr(p.image_processor, "max_image_size", {"longest_edge": 28}),
        "`max_image_size` {'longest_edge': 56}",
    ),
    "no longer side": ("smolvlm", lambda p: setattr(p.image_processor.size, "longest_edge", None), "`longest_edge`"),
    "patches": ("mistral3", lambda p: setattr(p, "patch_size", 16), "`patch_size` 14"),
    "merged patches": ("mistral3", lambda p: setattr(p, "spatial_merge_size", 1), "`spatial_merge_size` 2"),
    "patches of recurrent models": (
        "qwen3_5",
        lambda p: setattr(p.image_processor, "patch_size", 14),
        "`patch_size` 16",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_processor_of_another_model_is_refused(what):
    kind, change, message = WRONG[what]
    model = tiny(kind)
    check = lambda: type(model).check_processor(model.processor, model.base.config, Path("folder"))  # noqa: E731
    check()
    change(model.processor)
    with pytest.raises(UserError, match=message.replace("{", "\\{")):
        check()


def test_a_picture_of_one_token_is_refused():
    with pytest.raises(UserError, match="longer than 28 pixels on one side"):
        tiny("mistral3").encode(["what"], [picture(0, (20, 28))])


@pytest.mark.parametrize("kind", ["mistral3", "qwen3_5"])
def test_a_picture_that_would_have_no_pixel_is_refused(kind):
    model = tiny(kind)
    with pytest.raises(UserError, match="cannot be attacked through pictures of 600 x 1"):
        model.preprocessing((1, 600))
    with pytest.raises(UserError, match="cannot show pictures of 600 x 1"):
        model.encode(["what"], [picture(0, (600, 1))])


def test_a_smolvlm_that_does_not_cut_pictures_shows_the_whole():
    model = tiny("smolvlm")
    model.processor.image_processor.do_image_splitting = False
    pixels = torch.rand(1, 3, 60, 80, generator=torch.Generator().manual_seed(0))
    preprocess = model.preprocessing((60, 80))
    assert preprocess(pixels).shape == (1, 3, 56, 56) and preprocess.exact_by == "emulation"
    assert int(model.encode(["what"], [picture(0, (80, 60))]).image_mask.sum()) == 4
    laws.logits_are_those_of_the_processors_own_inputs(lambda: model, None)


def test_heads_that_predict_several_tokens_are_left_unread(tmp_path):
    """Qwen3.5 is published with such a head, which transformers' class does not have."""
    from safetensors.torch import load_file, save_file

    from mm_cb.models import load_tower

    folder = tmp_path / "model"
    laws.saved(tiny("qwen3_5"), folder)
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file) | {"mtp.fc.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    assert len(load_tower(folder, 2).decoder_blocks) == 2


def test_a_target_stands_behind_an_empty_thinking_block_or_in_an_open_one():
    model = tiny("qwen3_5")
    empty, opened = "<think>\n\n</think>\n\n", "<think>\n"
    for thinking, block in ((False, empty), (True, opened)):
        model.thinking = thinking
        asked = model.prompt("what is", has_image=True)
        answered = model.prompt("what is", has_image=True, completion="it")
        assert asked.endswith(f"<|im_start|>assistant\n{block}") and answered == f"{asked}it<|im_end|>"
        target = model.prompt("what is", has_image=True, completion="it", close_turn=False)
        assert target == f"{asked}it"
    inputs = model.encode(["what is"], [None], completions=["it"])
    assert model.processor.tokenizer.decode(inputs.input_ids[inputs.completion_mask.bool()]) == "it<|im_end|>"


def test_thinking_is_asked_for_by_a_flag_that_the_run_records(tmp_path):
    laws.saved(tiny("qwen3_5"), tmp_path / "model")
    line = {"id": "a", "prompt": "what is", "target": "it", "image": None}
    (tmp_path / "behaviors.jsonl").write_text(json.dumps(line) + "\n")
    given = ["attack", "--model", tmp_path / "model", "--behaviors", tmp_path / "behaviors.jsonl"]
    given += ["--attack", "prefill_only", "--max-new-tokens", 2]
    held = []
    for name, flags in {"off": [], "on": ["--thinking"]}.items():
        assert cli.run([str(word) for word in [*given, *flags, "--out", tmp_path / name]]) == 0
        held.append(json.loads((tmp_path / name / "run.json").read_text())["recipe"])
    assert held[1] == held[0] | {"thinking": True}
    source = source_again(tmp_path / "on", read_run(tmp_path / "on"), "{}", "cpu")
    assert load_subject(source, "base").model.prompt("what is", has_image=False).endswith("assistant\n<think>\n")


def test_thinking_is_refused_where_no_block_can_be_left_open(tmp_path):
    with pytest.raises(UserError, match="`--thinking` must be given a model whose chat template"):
        load_subject(ModelSource("miniature", thinking=True), "base")
    with pytest.raises(UserError, match="where the model is served"):
        open_engine(ModelSource("m", endpoint="http://127.0.0.1:1", thinking=True), "base", 1)


@pytest.mark.parametrize("known", [True, False])
def test_a_processor_that_is_not_imitated_exactly_is_run_itself_and_the_run_says_so(
    known, monkeypatch, capsys, tmp_path
):
    model = laws.saved(tiny("llava"), tmp_path / "model")
    kind = type(model.processor.image_processor)
    shown = kind.preprocess

    def shifted(self, *given, **settings):
        made = shown(self, *given, **settings)
        made["pixel_values"] = made["pixel_values"] + (self.shift if known else 1e-3)
        return made

    monkeypatch.setattr(kind, "preprocess", shifted)
    monkeypatch.setattr(kind, "shift", 0.0, raising=False)
    file = next(path for path in (tmp_path / "model").glob("*process*.json"))
    held = json.loads(file.read_text())
    held["image_processor"]["shift"] = 1e-3
    file.write_text(json.dumps(held))
    line = {"id": "a", "prompt": "what is", "target": "it", "image": None}
    (tmp_path / "b.jsonl").write_text(json.dumps(line) + "\n")
    asked = ["attack", "--model", tmp_path / "model", "--behaviors", tmp_path / "b.jsonl", "--out", tmp_path / "out"]
    assert cli.run([str(word) for word in [*asked, "--attack", "pgd,noise", "--steps", 1, "--max-new-tokens", 1]]) == 0
    (told,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("pixels: the image processor of")]
    assert "is not imitated exactly for pictures of 28 x 28" in told
    assert ("with its `shift` as its class has it" if known else "versions of its libraries") in told
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert protocol["pixels_by_processor"] == ["pgd"]
    assert cli.run(["attack", "verify", str(tmp_path / "out")]) == 0
