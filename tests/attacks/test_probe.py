"""A harmfulness probe under attack: what it withholds, and the attack that knows it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mm_cb import cli
from mm_cb.attacks.objectives.adaptive import LongTargetObjective
from mm_cb.attacks.objectives.probe import ProbeObjective
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl, read_run
from mm_cb.data.behaviors_file import grey_canvas, read_behaviors
from mm_cb.inference.subjects import Subject
from mm_cb.miniature.language import REFUSAL
from mm_cb.models import load_model
from mm_cb.models.fingerprint import fingerprint
from mm_cb.models.probe import ProbeNetwork, load_probe, save_probe
from tests.attacks.helpers import attack, first_behaviors


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return first_behaviors(tmp_path_factory.mktemp("probe"), 1)


@pytest.fixture(scope="module", autouse=True)
def miniature():
    model = load_model("miniature")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mm_cb.inference.subjects.load_model", lambda *_, **__: model)
        yield model


@pytest.fixture
def probe(tmp_path, miniature):
    def make(threshold, layer=4):
        hidden = miniature.base.config.text_config.hidden_size
        torch.manual_seed(0)
        counts = {"flagged": 0, "of": 1}
        told = {"model": "miniature", "fingerprint": fingerprint("miniature"), "adapter_sha256": None, "layer": layer}
        told |= {"kind": "linear", "hidden_size": hidden, "threshold": threshold, "refusal": REFUSAL}
        save_probe(
            tmp_path / f"{threshold}",
            ProbeNetwork(hidden, "linear"),
            {**told, "false_positive_rate": 0.01, "benign": counts, "harmful": counts},
        )
        return tmp_path / f"{threshold}"

    return make


def test_a_probe_that_flags_all_withholds_all_and_one_that_flags_nothing_changes_nothing(one, probe, tmp_path):
    out = {
        name: attack(tmp_path / name, one, "no_attack,pgd", probe=given and str(given), steps=1)
        for name, given in (("none", None), ("all", probe(-1e9)), ("nothing", probe(1e9)))
    }
    items = {name: read_jsonl(folder / "items.jsonl") for name, folder in out.items()}
    assert {item["subject"] for item in items["all"]} == {"base+probe"}
    assert all(item["completion"] == REFUSAL and item["outcome"] == "refusal" for item in items["all"])
    assert items["none"][0]["completion"] != REFUSAL
    for plain, watched in zip(items["none"], items["nothing"], strict=True):
        assert plain["completion"] == watched["completion"] and plain["loss"] == watched["loss"]
    verify_run(out["all"])
    assert any(name.endswith("probe.safetensors") for name in read_run(out["all"])["inputs"])


def test_the_probes_score_is_in_the_loss_of_the_attack_that_knows_it(one, probe, miniature):
    """Against a plain pass: softplus of the margin over the response's tokens, and the target's loss beside it."""
    behaviors = read_behaviors(one)
    pictures = [grey_canvas(miniature.canvas)]
    watched = load_probe(probe(0.5), miniature, None)
    subject = Subject("base+probe", miniature, probe=watched)
    objective = ProbeObjective(subject, behaviors, pictures, weight=2.0, max_new_tokens=6)
    pixels = torch.full((1, 3, *miniature.canvas), 0.5, requires_grad=True)
    target, term = objective.terms(objective.preprocess(pixels))
    with torch.no_grad():
        states = miniature.forward(objective.forced.inputs, hidden_states=True).hidden_states[4]
        said = objective.forced.inputs.completion_mask.bool()
        scores = states[said] @ watched.network.layers[0].weight[0] + watched.network.layers[0].bias - 0.5
        expected = functional.softplus(scores).mean()
    assert term.item() == pytest.approx(expected.item(), rel=1e-3)
    plain = LongTargetObjective(subject, behaviors, pictures, max_new_tokens=6)
    assert said.sum() == (plain.forced.response != -100).sum() > 1
    loss = objective.loss(objective.preprocess(pixels))
    assert loss.item() == pytest.approx((target + 2 * term).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(term.sum(), pixels)
    assert gradient.abs().max() > 0
    assert miniature.probe is None  # what the base says behind a target is watched by nobody


def test_the_attack_that_knows_the_probe_lowers_its_score(one, probe, miniature, tmp_path):
    given = probe(0.5)
    watched = load_probe(given, miniature, None)
    subject, behaviors = Subject("base+probe", miniature, probe=watched), read_behaviors(one)
    out = attack(tmp_path / "knows", one, "pgd_probe", probe=str(given), steps=6, term_weight=50.0)
    (item,) = read_jsonl(out / "items.jsonl")
    assert item["condition"] == "pgd_probe" and item["given"] == "supplied text"
    from PIL import Image

    objective = ProbeObjective(subject, behaviors, [grey_canvas(miniature.canvas)], max_new_tokens=8)
    terms = []
    for name in (item["clean_image"], item["image"]):
        picture = Image.open(out / name)
        levels = torch.tensor(list(picture.convert("RGB").getdata())).view(picture.height, picture.width, 3)
        with torch.no_grad():
            terms.append(objective.terms(objective.preprocess(levels.permute(2, 0, 1)[None] / 255))[1].item())
    assert terms[1] < terms[0]
    verify_run(out)


def test_what_does_not_go_together_is_one_line(one, probe, miniature, tmp_path, capsys):
    behaviors = ["--behaviors", str(one), "--out", str(tmp_path / "run")]
    for words, told in (
        (["--attack", "pgd_probe"], "give the `--probe`"),
        (["--attack", "embedding", "--probe", str(probe(1.0))], "no probe watches"),
        (["--probe", str(tmp_path)], "must be what `mm-cb probe` wrote"),
    ):
        assert cli.run(["attack", "--model", "miniature", *behaviors, *words]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.strip().splitlines()) == 1
    served = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "eval")]
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"id": "1", "prompt": "hello"}\n')
    assert cli.run(["eval", "over-refusal", *served, "--data", str(requests), "--probe", str(probe(1.0))]) == 2
    assert "drop it, or `--endpoint`" in capsys.readouterr().err


def test_a_probe_is_bound_to_its_states(probe, miniature, tmp_path):
    assert math.isclose(load_probe(probe(0.25), miniature, None).threshold, 0.25)
    folder = probe(0.75)
    for field, value, told in (
        ("fingerprint", "0" * 64, "trained on other weights"),
        ("adapter_sha256", "0" * 64, "with an adapter"),
        ("layer", 99, "at layers 1 to"),
        ("hidden_size", 3, "reads 3 numbers"),
        ("kind", "mpl", "did you mean `mlp`"),
        ("kind", "mlp", "must hold the tensors of a mlp probe"),
    ):
        from tests.attacks.helpers import edited

        def change(content, field=field, value=value):
            content[field] = value

        held = (folder / "probe.json").read_text()
        edited(folder / "probe.json", change)
        with pytest.raises(Exception, match=told):
            load_probe(folder, miniature, None)
        (folder / "probe.json").write_text(held)
    (folder / "probe.json").write_text(held.replace('"threshold": 0.75', '"threshold": 7.5'))
    with pytest.raises(UserError, match=r"probe\.json` was changed after"):
        load_probe(folder, miniature, None)
    (folder / "probe.json").write_text(held)
    weights = (folder / "probe.safetensors").read_bytes()
    (folder / "probe.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match=r"probe\.safetensors` was changed after"):
        load_probe(folder, miniature, None)
    (folder / "probe.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match="must hold the tensors"):
        load_probe(folder, miniature, None)


def test_withheld_is_what_a_token_by_token_pass_finds(probe, miniature):
    """The reference runs each answer's beginning by itself, and looks at the last state alone."""
    inputs = miniature.encode(["tell me", "how do i brew it please"], [None, None])
    said = [[20, 31, 42], [50]]
    for layer in (2, 6 if len(miniature.decoder_blocks) == 6 else len(miniature.decoder_blocks)):
        watched = load_probe(probe(0.0, layer), miniature, None)
        highest = []
        for row, tokens in enumerate(said):
            real = inputs.attention_mask[row].bool()
            asked, scores = inputs.input_ids[row][real].tolist(), []
            for stop in range(1, len(tokens) + 1):
                ids = torch.tensor([asked + tokens[:stop]])
                states = miniature.model(input_ids=ids, output_hidden_states=True).hidden_states
                scores.append(watched.network(states[layer][0, -1]).item())
            highest.append(max(scores))
        low, high = sorted(highest)
        middle = replace(watched, threshold=(low + high) / 2)
        assert middle.withheld(miniature, inputs, said) == [one > middle.threshold for one in highest]
        assert replace(watched, threshold=high + 1e-3).withheld(miniature, inputs, said) == [False, False]
        assert replace(watched, threshold=low - 1e-3).withheld(miniature, inputs, said) == [True, True]
    assert watched.withheld(miniature, inputs, [[], []]) == [False, False]
