import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.models import load_model
from mm_cb.models.probe import ProbeNetwork, load_probe
from mm_cb.training import probe as training
from mm_cb.training.probe import ProbeSettings, choose, fit, flagged, threshold_of, train_probe
from mm_cb.training.recipes.recipe import load_recipe
from tests.tiny_llava import tiny_llava
from tests.training.test_run import OPTIONS


@pytest.fixture
def recipe(model_folder, examples, monkeypatch):
    monkeypatch.setattr(training, "load_examples", lambda recipe: examples)
    return load_recipe("miniature", [f"model={model_folder}", *OPTIONS])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.floats(0, 1))
def test_the_threshold_is_the_lowest_that_keeps_the_rate(scores, rate):
    threshold = threshold_of(scores, rate)
    allowed = int(rate * len(scores))
    assert sum(score > threshold for score in scores) <= allowed
    if allowed < len(scores):
        assert sum(score >= threshold for score in scores) > allowed  # a lower one would flag more
    assert threshold in scores


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_probe_learns_a_direction_and_the_same_again(kind):
    generator = torch.Generator().manual_seed(1)

    def rows(harmful):
        made = [torch.randn(5, 8, generator=generator) for _ in range(60)]
        for row in made:
            row[int(row[0, 0] > 0) + 1, 3] += 6.0 * harmful  # one token tells
        return made[:50], made[50:]

    states = {"circuit_breaker": rows(1), "retain": rows(0)}
    settings = ProbeSettings(kind, false_positives=0.1)
    network, threshold = fit(states, settings, seed=0)
    assert flagged(network, states["retain"][1], threshold)["flagged"] <= 1
    assert flagged(network, states["circuit_breaker"][1], threshold)["flagged"] >= 8
    again, same = fit(states, settings, seed=0)
    assert same == threshold and all(map(torch.equal, network.state_dict().values(), again.state_dict().values()))


def test_held_out_rows_and_their_copies_are_not_trained_on(recipe, examples):
    trained, held_out = choose(examples, "retain", recipe, 512)
    assert len(trained) == 10 and len(held_out) == 2  # of 12, a fifth
    assert not {e.id for e in trained} & {e.id for e in held_out}
    assert choose(examples, "retain", recipe, 512)[1] == held_out
    with pytest.raises(UserError, match="2 or more rows of the retain set"):
        choose([e for e in examples if e.set == "circuit_breaker"], "retain", recipe, 512)


def test_a_trained_probe_is_read_back_for_its_model_alone(recipe, model_folder, tmp_path):
    told = train_probe(recipe, tmp_path / "probe", None, ProbeSettings("mlp"))
    assert told["layer"] == 2 and told["benign"] == {"flagged": 0, "of": 2} and told["harmful"]["of"] == 2
    again = train_probe(recipe, tmp_path / "again", None, ProbeSettings("mlp"))
    assert told == again == json.loads((tmp_path / "probe" / "probe.json").read_text())
    files = [(tmp_path / name / "probe.safetensors").read_bytes() for name in ("probe", "again")]
    assert files[0] == files[1]
    read = load_probe(tmp_path / "probe", load_model(model_folder), None)
    assert isinstance(read.network, ProbeNetwork) and read.threshold == told["threshold"]
    other = tiny_llava(blocks=4, seed=1)
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="trained on other weights"):
        load_probe(tmp_path / "probe", load_model(tmp_path / "other"), None)
    with pytest.raises(UserError, match="different in"):
        train_probe(recipe, tmp_path / "probe", None, ProbeSettings("linear"))
    with pytest.raises(UserError, match=r"`--layer` must be in 1\.\.4"):
        train_probe(recipe, tmp_path / "deep", None, ProbeSettings(layer=9))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kind", "tree"], "unknown kind of probe"),
        (["--false-positives", "2"], "0 to 1"),
        (["--refusal", " "], "not empty"),
        (["--rows", "0"], "from 2"),
        (["training.max_steps=5"], "does not read `training.max_steps`"),
        (["lora.r=2"], "does not read `lora.r`"),
        (["circuit_breaker={}"], "does not read `circuit_breaker`"),
    ],
)
def test_bad_settings_are_one_line(words, told, tmp_path, capsys):
    assert cli.run(["probe", "miniature", "--out", str(tmp_path / "probe"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
