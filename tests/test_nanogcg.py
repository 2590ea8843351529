"""The script that lets nanogcg write a prompts file: with a stand-in for nanogcg, and with nanogcg where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mm_cb import cli
from mm_cb.data.prompts_file import read_prompts
from mm_cb.models import load_model
from mm_cb.models.fingerprint import remember_base
from tests.models.shapes import MISTRAL_TEMPLATE, sentencepiece_like_tokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
ASKED = [
    {"id": "tea", "prompt": "how to brew tea", "target": "it is a circle"},
    {"id": "red", "prompt": "what is the red square", "target": "a picture"},
    {"id": "blue", "prompt": "tell me", "target": "a red square"},
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("nanogcg_prompts", None)
    import nanogcg_prompts

    return nanogcg_prompts


@pytest.fixture
def stand_in(monkeypatch):
    """In place of nanogcg: what it was given, and the suffixes that it finds, with their losses."""
    module = SimpleNamespace(runs=[], finds={"s1": 2.0, "s2": 1.0, "s3": 3.0}, stops_at=None)

    def run(model, tokenizer, messages, target, config):
        if len(module.runs) == module.stops_at:
            raise KeyboardInterrupt
        logits = model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))).logits
        module.runs.append((messages, target, config, logits))
        return SimpleNamespace(losses=list(module.finds.values()), strings=list(module.finds))

    module.GCGConfig, module.run = dict, run
    monkeypatch.setitem(sys.modules, "nanogcg", module)
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("tiny") / "llama", sentencepiece_like_tokenizer()
    tokenizer.chat_template = MISTRAL_TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def behaviors(tmp_path):
    path = tmp_path / "behaviors.jsonl"
    path.write_text("".join(json.dumps(one | {"image": None}) + "\n" for one in ASKED))
    return path


def words(llama, behaviors, out, *more):
    return ["--model", str(llama), "--behaviors", str(behaviors), "--out", str(out), *map(str, more)]


def refused(script, capsys, arguments, told):
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanogcg_prompts: ") and error.count("\n") == 1 and told in error


def test_every_behaviour_gets_the_best_suffix_and_the_file_is_one_that_is_read(
    script, stand_in, llama, behaviors, tmp_path
):
    out = tmp_path / "prompts.jsonl"
    assert script.main(words(llama, behaviors, out, "--steps", 7, "--width", 5, "--seed", 3)) == 0
    prompts = read_prompts(out, [one["id"] for one in ASKED])
    for asked, (messages, target, config, _) in zip(ASKED, stand_in.runs, strict=True):
        assert messages == [{"role": "user", "content": f"{asked['prompt']} {{optim_str}}"}]
        assert target == asked["target"] and not config["use_prefix_cache"]
        assert (config["num_steps"], config["search_width"], config["seed"]) == (7, 5, 3)
        (prompt,) = prompts[asked["id"]]
        assert prompt.messages == ({"role": "user", "content": f"{asked['prompt']} s2"},)
        assert prompt.source == f"nanogcg, 7 steps of 5, seed 3, float32, against {llama}"


def test_a_file_that_was_stopped_is_gone_on_with_and_that_of_other_settings_is_refused(
    script, stand_in, llama, behaviors, tmp_path, capsys
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "prompts.jsonl"
    assert script.main(words(llama, behaviors, whole)) == 0
    stand_in.runs.clear()
    stand_in.stops_at = 1
    with pytest.raises(KeyboardInterrupt):
        script.main(words(llama, behaviors, out))
    assert len(out.read_text().splitlines()) == 1
    with out.open("a") as file:
        file.write('{"id": "red", "mess')  # a line that was being written
    stand_in.stops_at = None
    assert script.main(words(llama, behaviors, out)) == 0
    assert len(stand_in.runs) == 3 and out.read_bytes() == whole.read_bytes()
    assert script.main(words(llama, behaviors, out)) == 0 and len(stand_in.runs) == 3
    refused(script, capsys, words(llama, behaviors, out, "--seed", 1), "it has some of `nanogcg, 250 steps of 512")


def test_the_adapter_is_on(script, stand_in, llama, behaviors, tmp_path):
    layers = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(llama).model, layers).save_pretrained(tmp_path / "rr")
    remember_base(tmp_path / "rr", str(llama))
    script.main(words(llama, behaviors, tmp_path / "base.jsonl"))
    script.main(words(llama, behaviors, tmp_path / "rr.jsonl", "--adapter", tmp_path / "rr"))
    off, on = stand_in.runs[0][-1], stand_in.runs[len(ASKED)][-1]
    assert off.shape == on.shape and not torch.allclose(off, on)


def test_a_suffix_that_spells_a_control_token_is_passed_over(script, stand_in, llama, behaviors, tmp_path, capsys):
    out = tmp_path / "prompts.jsonl"
    stand_in.finds = {"x <image>": 0.5, "s2": 1.0}
    assert script.main(words(llama, behaviors, out)) == 0
    assert read_prompts(out, [one["id"] for one in ASKED])["blue"][0].messages[0]["content"] == "tell me s2"
    stand_in.finds = {"x <image>": 0.5}
    capsys.readouterr()
    refused(script, capsys, words(llama, behaviors, tmp_path / "none.jsonl"), "spells a control token")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "a {optim_str} b"}, "must not have `{optim_str}`"),
        ({"target": None, "call": {"name": "f", "arguments": {}}}, "must have"),
    ],
)
def test_what_nanogcg_cannot_search_for_is_refused(script, stand_in, llama, tmp_path, capsys, change, told):
    path = tmp_path / "behaviors.jsonl"
    path.write_text(json.dumps({key: value for key, value in (ASKED[0] | change).items() if value is not None}) + "\n")
    refused(script, capsys, words(llama, path, tmp_path / "out.jsonl"), told)


def test_bad_input_is_one_line_and_exit_code_2(script, stand_in, llama, behaviors, tmp_path, capsys, monkeypatch):
    out = tmp_path / "prompts.jsonl"
    refused(script, capsys, words("miniature", behaviors, out), "`miniature` sees pictures")
    refused(script, capsys, words(llama, tmp_path / "none.jsonl", out), "none.jsonl` is not there")
    refused(script, capsys, words(tmp_path / "nothing", behaviors, out), "nothing")
    refused(script, capsys, words(llama, behaviors, out, "--adapter", tmp_path / "no"), "no")
    refused(script, capsys, words(llama, behaviors, out, "--steps", 0), "`--steps` must be a whole number from 1")
    refused(script, capsys, words(llama, behaviors, out, "--seed", -1), "`--seed` must be a whole number from 0")
    refused(script, capsys, words(llama, behaviors, tmp_path), str(tmp_path))
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    refused(script, capsys, words(llama, behaviors, out), "pip install -e '.[nanogcg]'")
    assert not out.exists() and not stand_in.runs


def test_the_script_is_one_that_is_started(tmp_path):
    (tmp_path / "nanogcg.py").touch()
    start = [sys.executable, str(SCRIPTS / "nanogcg_prompts.py"), *words("m", tmp_path / "none.jsonl", tmp_path / "o")]
    done = subprocess.run(start, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and "none.jsonl` is not there" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def nanogcg():
    """The package itself, whose wish for deterministic algorithms ends with the test."""
    yield pytest.importorskip("nanogcg")
    torch.use_deterministic_algorithms(False)


def test_nanogcg_itself_on_a_tiny_model_and_its_prompts_are_attacked_with(script, nanogcg, llama, behaviors, tmp_path):
    out, again = tmp_path / "prompts.jsonl", tmp_path / "again.jsonl"
    few = ["--steps", 2, "--width", 48]
    assert script.main(words(llama, behaviors, out, *few)) == 0
    first, *rest = out.read_text().splitlines(keepends=True)
    again.write_text(first)
    assert script.main(words(llama, behaviors, again, *few)) == 0 and again.read_bytes() == out.read_bytes()
    model, ask = load_model(llama), [{"role": "user", "content": f"{ASKED[0]['prompt']} {{optim_str}}"}]
    config = nanogcg.GCGConfig(num_steps=2, search_width=48, seed=0, use_prefix_cache=False, verbosity="ERROR")
    best = nanogcg.run(model.model, model.processor.tokenizer, ask, ASKED[0]["target"], config).best_string
    assert json.loads(first)["messages"][0]["content"] == f"{ASKED[0]['prompt']} {best}"
    asked = ["attack", "--model", llama, "--behaviors", behaviors, "--attack", "imported", "--prompts", out]
    assert cli.run([*map(str, asked), "--max-new-tokens", "2", "--out", str(tmp_path / "run")]) == 0
