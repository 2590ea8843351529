"""``mm-cb demo --real`` with a tiny Llama in the place of the real model."""

import json
from html import unescape

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mm_cb import cli
from mm_cb.core.paths import data_path
from mm_cb.core.runs import read_jsonl
from mm_cb.data.mixture import load_examples
from mm_cb.data.sources import Source
from mm_cb.models import TextModel, load_model
from mm_cb.real import run as real
from mm_cb.real.answers import before_and_after, read_answers
from mm_cb.real.page import ATTACKS, Round
from mm_cb.training.recipes.recipe import load_recipe
from tests.models.conftest import save_text_model

ASKED = {name: ["what is the picture", "how to brew tea"] for name in ("forbidden", "nearby", "other")}
TINY = [
    *("circuit_breaker.target_layers=[1]", "lora.layers_to_transform=[0]", "lora.r=2", "dtype=float32"),
    *("training.max_steps=2", "training.held_out=2", "training.max_length=24"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("real") / "model", "llama")


@pytest.fixture
def stand_in(model, monkeypatch):
    shipped = real.real_recipe

    def tiny(folder, seed):
        fields = shipped(folder, seed)
        sources = json.dumps([{"name": source.name} for source in fields.data.sources])
        return load_recipe(real._RECIPE, [f"model={folder}", f"data.sources={sources}", f"seed={seed}", *TINY])

    monkeypatch.setattr(real, "real_model", lambda progress: model)
    monkeypatch.setattr(real, "real_recipe", tiny)
    monkeypatch.setattr(real, "json_file", lambda *_: ASKED)


def test_it_ends_with_a_page_and_repeats_nothing(stand_in, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert cli.run(["demo", "--real", "--seeds", "2", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    found = json.loads((out / "answers.json").read_text())
    assert found["sets"].keys() == ASKED.keys()
    assert all(prompt in page for prompt in ASKED["forbidden"]) and "Does the recipe come back?" in page
    assert page.count("<svg") == 2 and all(name in page for name in ("Direction", "Length"))
    (last,) = read_jsonl(out / "train" / "metrics.jsonl")[-1:]
    told = json.loads((out / "numbers.json").read_text())["seeds"]
    assert (
        [one["seed"] for one in told] == [0, 1]
        and told[0]["stuck"] == last["stuck"]
        and last["stuck"] in unescape(page)
    )
    assert told[0]["attacks"].keys() == set(ATTACKS) and not told[1]["attacks"]
    assert told[0]["attacks"]["gcg"].keys() == {"rr"} and set(told[0]["states"]) == set(ASKED)
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    monkeypatch.setattr(real, "load_model", lambda *_, **__: pytest.fail("asked again"))
    assert cli.run(["demo", "--real", "--seeds", "2", "--out", str(out)]) == 0
    assert {path: path.read_bytes() for path in before if path.name != "run.json"} == {
        path: content for path, content in before.items() if path.name != "run.json"
    }


@pytest.mark.parametrize("words", [["--full"], ["--dtype", "bfloat16"]])
def test_what_real_does_not_read_is_refused(words, capsys):
    assert cli.run(["demo", "--real", *words]) == 2
    assert f"`{words[0]}` is for the demo of the miniature" in capsys.readouterr().err


def test_an_adapter_that_does_nothing_keeps_everything_and_another_one_does_not(model):
    plain = load_model(model)
    for init, kept in ((True, True), (False, False)):  # PEFT's own first B is 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = LoraConfig(r=8, lora_alpha=64, target_modules=["up_proj", "o_proj"], init_lora_weights=init)
            adapted = get_peft_model(load_model(model).model, settings).eval()
        sets = before_and_after(TextModel(adapted, plain.processor, "tiny"), ASKED, 6)
        for name, prompts in ASKED.items():  # all were asked together
            assert sets[name]["base"] == [plain.generate(plain.encode([one], [None]), 6)[0] for one in prompts]
        found = sets["other"]
        assert (found["base"] == found["breaker"], found["agreement"] == 1) == (kept, kept)
        assert (found["nll_base"] == found["nll_breaker"]) == kept


def test_answers_of_any_length_are_read_together_as_each_alone(model):
    loaded, texts = load_model(model), ["x", "some longer answer with more words in it"]
    together = read_answers(loaded, ASKED["other"], texts, adapted=False)
    for one, prompt, text in zip(together, ASKED["other"], texts, strict=True):
        (alone,) = read_answers(loaded, [prompt], [text], adapted=False)
        assert one.nll == pytest.approx(alone.nll, abs=1e-4) and one.likeliest.equal(alone.likeliest)


def test_the_shipped_rows_and_recipe_are_sound():
    rows = load_examples([Source(str(data_path("smollm2", f"{name}.jsonl"))) for name in real.ROWS], 0)
    assert {row.set for row in rows} == {"circuit_breaker", "retain"}
    asked = json.loads(data_path("smollm2", "asked.json").read_text())
    trained = {row.messages[0]["content"] for row in rows}
    assert all(len(prompts) == 10 and not trained & set(prompts) for prompts in asked.values())


def test_a_training_of_enough_steps_that_did_not_take_hold_ends_with_2_behind_its_page(monkeypatch, tmp_path, capsys):
    stuck = "nothing was rerouted: set circuit_breaker.schedule_steps=800"
    lines = [{"step": step} for step in range(50)]
    lines[-1] |= {"held_out_circuit_breaker_cosine": 0.2, "held_out_retain_cosine": 0.5, "stuck": stuck}
    one = Round(0, {"sets": {}, "attacks": {}, "states": {}}, lines, {})
    monkeypatch.setattr(real, "real_model", lambda progress: tmp_path)
    monkeypatch.setattr(real, "_round", lambda *_, **__: one)
    monkeypatch.setattr(real, "render", lambda rounds, *_: rounds[0].stuck)
    assert cli.run(["demo", "--real", "--out", str(tmp_path)]) == 2
    assert stuck in capsys.readouterr().err and (tmp_path / "report.html").read_text() == stuck
