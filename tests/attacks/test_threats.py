import json

import numpy as np
import pytest
import torch
from PIL import Image

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.refused_settings import refuse_idle, refuse_mismatch
from mm_cb.attacks.saved import read
from mm_cb.attacks.threats import Threat
from mm_cb.attacks.transfer import run_transfer
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from mm_cb.report import write_report
from tests.attacks.helpers import attack as plain_attack
from tests.attacks.helpers import edited, first_behaviors, restated

FOUR = ("l2:1", "patch:20", "border:3", "blank")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run per threat model, and a plain one: two behaviours, few steps, the placebo and a chain of two attacks."""
    folder = tmp_path_factory.mktemp("threats")
    first_behaviors(folder, 2, start=1)
    for threat in FOUR:
        attack(folder, threat, "noise,pgd,apgd", steps=3, restarts=2, chain=True, iterates=1, max_new_tokens=2)
    attack(folder, "linf", "pgd", steps=1, max_new_tokens=2)
    return folder


def attack(folder, threat, attacks, **changes):
    out = changes.pop("out", folder / threat)
    if threat == "l2:1" and "pgd" in attacks.split(","):
        changes["optimizer"] = "momentum"
    settings = {"threat": Threat.read(threat, 255), "batch": 8, "max_new_tokens": 6} | changes
    return plain_attack(out, folder / "behaviors.jsonl", attacks, **settings)


@pytest.mark.parametrize("threat", FOUR)
def test_every_file_is_what_the_threat_model_allows_and_the_run_verifies(made, threat):
    rows = verify_run(made / threat)
    assert len(rows) == len(list((made / threat / "images").glob("*/*.png"))) > 20
    checks = {check["name"]: check for check in json.loads((made / threat / "checks.json").read_text())}
    assert all(check["passed"] for check in checks.values())
    assert (f"every attacked file is inside {threat}" in checks) == (threat != "blank")
    for path in (made / threat / "images").glob("*/*.png"):
        clean = np.asarray(Image.open(path.parent.with_suffix(".clean.png"))).astype(int)
        change = np.asarray(Image.open(path)).astype(int) - clean
        height, width = change.shape[:2]
        assert np.abs(change).max() > 0
        if threat == "l2:1":
            assert np.sqrt((change**2).sum()) / 255 <= 1
        elif threat == "patch:20":
            change[:20, :20] = 0
            assert not change.any()
        elif threat == "border:3":
            assert not change[3 : height - 3, 3 : width - 3].any() and change[:3].any() and change[:, -3:].any()


def test_the_placebo_is_as_large_as_the_threat_model_allows(made):
    noise = {
        threat: [
            c for i in read_jsonl(made / threat / "items.jsonl") if i["condition"] == "noise" for c in i["candidates"]
        ]
        for threat in FOUR
    }
    assert all(0.99 < c["distance"] <= 1 for c in noise["l2:1"])
    assert all(c["distance"] == 0 and c["epsilon"] > 100 for c in noise["patch:20"] + noise["border:3"])


def test_the_placebo_of_a_small_l2_ball_is_no_clean_picture():
    """On flat grey all signs would round to nothing at once."""
    for size, radius in (((42, 84), 0.1), ((42, 84), 1.0), ((672, 672), 1.0)):
        clean = torch.full((2, 3, *size), 128 / 255)
        noise = Threat("l2", 255, radius).placebo(clean, [torch.Generator().manual_seed(i) for i in (0, 1)])
        changed = ((255 * noise).round() - 128).flatten(1).norm(dim=1) / 255
        assert ((0.9 * radius < changed) & (changed <= radius + 1e-6)).all()


def test_a_blank_start_forgets_the_picture(made):
    """Two behaviours that share nothing but their size begin at one and the same grey."""
    curves = {}
    for threat in ("blank", "linf"):
        artefacts = [json.loads(p.read_text()) for p in (made / threat / "images").glob("*/pgd-s0-r0.json")]
        curves[threat] = [(a["curve"][0], a["loss_clean"]) for a in artefacts]
    assert all(abs(first - clean) <= 1e-4 for first, clean in curves["linf"])
    assert any(abs(first - clean) > 1e-3 for first, clean in curves["blank"])


def test_a_picture_outside_the_norm_that_its_run_states_is_noticed(made, tmp_path):
    """Also where the picture's own JSON states the larger set: what counts is what run.json says."""
    attack(made, "l2:1", "apgd", out=tmp_path / "run")
    restated(tmp_path / "run", lambda run: run["recipe"]["options"].update(threat_model="l2:0.2"))
    for stated in ("l2:1", "l2:0.2"):
        for path in (tmp_path / "run" / "images").glob("*/*.json"):
            edited(path, lambda told, stated=stated: told["attack"].update(threat_model=stated))
        with pytest.raises(UserError, match="the picture is outside l2:0.2"):
            verify_run(tmp_path / "run")


def test_a_distance_is_measured_in_the_threat_models_own_unit(tmp_path):
    clean = np.full((8, 10, 3), 100, np.uint8)
    changed = clean.copy()
    changed[0, 0, 0], changed[5, 6, 1] = 200, 97
    for name, array in (("clean.png", clean), ("changed.png", changed)):
        Image.fromarray(array).save(tmp_path / name)
    moved = read(tmp_path, "changed.png").levels_from(read(tmp_path, "clean.png"))
    expected = {"l2:2": 0.392333, "patch:2": 3, "patch:7": 0, "border:1": 3, "border:3": 0, "linf": None, "blank": None}
    assert expected["l2:2"] == pytest.approx((100**2 + 3**2) ** 0.5 / 255, abs=1e-6)
    assert {text: Threat.read(text, 255).distance(moved) for text in expected} == expected


@pytest.mark.parametrize(
    "wrong",
    [
        *(("linf", 256), ("linf", -1), ("linf", 32, 8.0), ("blank", 255, 0.5), ("blank", 32), ("disc", 255, 3.0)),
        *(("l2", 255), ("l2", 255, -1.0), ("l2", 255, float("inf")), ("l2", 255, float("nan")), ("l2", 32, 1.0)),
        *(("patch", 255), ("patch", 255, 2.5), ("border", 255)),
    ],
)
def test_a_threat_model_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"`(norm|epsilon|{wrong[0]})`"):
        Threat(*wrong)


@pytest.mark.parametrize("text", ["linf", "l2:8", "l2:0.25", "patch:24", "border:4", "blank"])
def test_a_threat_model_is_read_back_from_its_text(text):
    assert Threat.read(text, 255).text == text
    assert Threat.read(None, 8) == Threat("linf", 8)


@pytest.mark.parametrize(
    ("attacks", "threat", "match"),
    [
        ("pgd", Threat("l2", 255, 1), "add `--optimizer momentum`"),
        ("pgd,embedding", Threat("patch", 32, 4), "a run of its own"),
        ("no_attack", Threat("patch", 32, 4), "does not read it"),
        ("prefill_only,embedding", Threat("patch", 32, 4), "does not read it"),
    ],
)
def test_a_threat_model_that_nothing_reads_or_that_contradicts_is_refused(attacks, threat, match):
    with pytest.raises(UserError, match=match):
        refuse_idle(AttackConfig(threat=threat), attacks.split(","))
        refuse_mismatch(AttackConfig(threat=threat), attacks.split(","))


def test_what_goes_together_is_not_refused():
    for attacks, threat, optimizer in (
        (["noise"], Threat("l2", 255, 1), "adam"),
        (["apgd"], Threat("l2", 255, 1), "adam"),
        (["pgd"], Threat("l2", 255, 1), "sign"),
        (["universal"], Threat("border", 32, 4), "adam"),
        (["prefill"], Threat("patch", 8, 4), "adam"),
    ):
        refuse_idle(AttackConfig(threat=threat, optimizer=optimizer), attacks)
        refuse_mismatch(AttackConfig(threat=threat, optimizer=optimizer), attacks)


@pytest.mark.parametrize(
    ("threat", "match"),
    [("patch:400", "--patch-size` 400 .*must lie inside"), ("border:40", "--border-width` 40 .*must lie in 1..")],
)
def test_a_threat_model_larger_than_a_picture_is_refused_before_anything_is_attacked(made, tmp_path, threat, match):
    with pytest.raises(UserError, match=match):
        attack(made, threat, "pgd", out=tmp_path / "run")
    assert not list(tmp_path.rglob("*.png"))


def test_runs_under_several_threat_models_have_no_common_worst_case(made, tmp_path):
    attack(made, "linf", "pgd", out=tmp_path / "one")
    attack(made, "border:3", "apgd", out=tmp_path / "two")
    with pytest.raises(UserError, match="the placebo and the worst case.* differ in threat_model"):
        write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    attack(made, "border:3", "noise", out=tmp_path / "noise")
    with pytest.raises(UserError, match="the placebo .* differ in threat_model"):
        write_report([tmp_path / "one", tmp_path / "noise"], tmp_path / "report.html")
    with pytest.raises(UserError, match="both attacked"):
        run_transfer(made / "patch:20", made / "linf", made / "behaviors.jsonl", tmp_path / "t")


def test_a_plain_run_says_nothing_new(made):
    """So that runs from before threat models could be named are gone on with, and compared."""
    assert "threat_model" not in json.loads((made / "linf" / "run.json").read_text())["recipe"]["options"]
    assert not any("distance" in c for i in read_jsonl(made / "linf" / "items.jsonl") for c in i["candidates"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Threat("linf", 8 / 255),
            r"`levels` of a threat must be a whole number of 255ths, got 0\.03.* \(float\)",
        ),
        (lambda: Threat("linf", "8"), r"`levels` of a threat must be a whole number of 255ths, got '8' \(str\)"),
        (lambda: Threat("l2", 255, "8"), r"`size` of a threat must be a number, got '8' \(str\)"),
        (lambda: AttackConfig(threat=8), r"`threat` must be an mm_cb.Threat, got 8 \(int\)"),
        (lambda: AttackConfig(threat="linf"), r"`threat` must be an mm_cb.Threat, got 'linf' \(str\)"),
    ],
)
def test_a_threat_of_another_type_is_one_sentence(make, message):
    with pytest.raises(TypeError, match=message):
        make()
