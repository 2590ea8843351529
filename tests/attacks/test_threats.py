import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mm_cb.attacks.options import refuse_idle, refuse_mismatch, resolve
from mm_cb.attacks.run import run_attack
from mm_cb.attacks.threats import Threat
from mm_cb.attacks.transfer import run_transfer
from mm_cb.attacks.verify.run import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.paths import data_path
from mm_cb.core.runs import read_jsonl
from mm_cb.report import write_report

FOUR = ("l2:1", "patch:20", "border:3", "blank")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run per threat model, and a plain one: two behaviours, few steps, the placebo and a chain of two attacks."""
    folder = tmp_path_factory.mktemp("threats")
    lines = data_path("miniature", "behaviors.jsonl").read_text().splitlines()[1:3]
    (folder / "pictures").mkdir()
    for line in lines:
        name = json.loads(line)["image"]
        (folder / name).write_bytes(data_path("miniature", name).read_bytes())
    (folder / "behaviors.jsonl").write_text("\n".join(lines) + "\n")
    for threat in (*FOUR, "linf"):
        attack(folder, threat, "noise,pgd,apgd", f"threat_model={threat}", "chain=true", "iterates=1")
    return folder


def attack(folder, name, attacks, *settings, **changes):
    more = ["optimizer=momentum"] if "threat_model=l2:1" in settings else []
    run_attack(
        **{"model": "miniature", "adapter": None, "behaviors": folder / "behaviors.jsonl", "out": folder / name}
        | {"attack": attacks, "epsilon": 255, "steps": 4, "restarts": 2, "seed": 0}
        | {"overrides": [*settings, *more, "max_new_tokens=6"]}
        | changes
    )


@pytest.mark.parametrize("threat", FOUR)
def test_every_file_is_what_the_threat_model_allows_and_the_run_verifies(made, threat):
    rows = verify_run(made / threat, model=None, adapter=None)
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
    placebos = {
        threat: [c for item in read_jsonl(made / threat / "items.jsonl") for c in item["candidates"]] for threat in FOUR
    }
    noise = {threat: [c for c in found if "noise" in c["image"]] for threat, found in placebos.items()}
    assert all(0.99 < c["distance"] <= 1 for c in noise["l2:1"])
    assert all(c["distance"] == 0 and c["epsilon"] > 100 for c in noise["patch:20"] + noise["border:3"])


def test_the_placebo_of_a_small_l2_ball_is_no_clean_picture():
    """On flat grey all signs would round to nothing at once."""
    for size, radius in (((42, 84), 0.1), ((42, 84), 1.0), ((672, 672), 1.0)):
        clean = torch.full((2, 3, *size), 128 / 255)
        noise = Threat.parse(f"l2:{radius}").placebo(clean, 255, [torch.Generator().manual_seed(i) for i in (0, 1)])
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


@pytest.mark.parametrize(
    ("forge", "match"),
    [
        (lambda told: told | {"distance": 0.5}, "distance 0.5 recorded"),
        (lambda told: told | {"attack": told["attack"] | {"threat_model": "l2:0.2"}}, "0.2 allowed"),
        (lambda told: told | {"attack": told["attack"] | {"threat_model": "linf"}}, "None found"),
        (lambda told: told | {"attack": told["attack"] | {"threat_model": "l3:1"}}, "must be as `mm-cb attack`"),
    ],
)
def test_a_forged_distance_or_threat_model_is_noticed(made, tmp_path, forge, match):
    run = shutil.copytree(made / "l2:1", tmp_path / "run")
    path = sorted((run / "images").glob("*/apgd-s0-r0.json"))[0]
    told = json.loads(path.read_text())
    forged = forge(told)
    path.write_text(json.dumps(forged))
    items = read_jsonl(run / "items.jsonl")
    for one in (c for item in items for c in item["candidates"] if c["image"] == told["image"]):
        one["distance"] = forged["distance"]
    (run / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(UserError, match=match):
        verify_run(run, model=None, adapter=None)


def test_a_distance_is_measured_in_the_threat_models_own_unit(tmp_path):
    clean = np.full((8, 10, 3), 100, np.uint8)
    changed = clean.copy()
    changed[0, 0, 0], changed[5, 6, 1] = 200, 97
    for name, array in (("clean.png", clean), ("changed.png", changed)):
        Image.fromarray(array).save(tmp_path / name)
    files = tmp_path / "changed.png", tmp_path / "clean.png"
    assert Threat.parse("l2:2").distance(*files) == pytest.approx((100**2 + 3**2) ** 0.5 / 255, abs=1e-6)
    assert Threat.parse("patch:2").distance(*files) == 3 and Threat.parse("patch:7").distance(*files) == 0
    assert Threat.parse("border:1").distance(*files) == 3 and Threat.parse("border:3").distance(*files) == 0
    assert Threat.parse("linf").distance(*files) is None and Threat.parse("blank").distance(*files) is None


@pytest.mark.parametrize(
    "text", ["", "l2", "l2:", "l2:-1", "l2:inf", "l2:nan", "patch:0", "patch:2.5", "linf:8", "blank:0.5", "disc:3"]
)
def test_a_threat_model_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="`threat_model` must be one of linf, l2:R, patch:N, border:N, blank"):
        resolve([f"threat_model={text}"])


@pytest.mark.parametrize(
    ("attacks", "settings", "epsilon", "match"),
    [
        (["pgd"], ["threat_model=l2:1", "optimizer=momentum"], 32, "add `--epsilon 255/255`"),
        (["pgd"], ["threat_model=blank"], 32, "add `--epsilon 255/255`"),
        (["pgd"], ["threat_model=l2:1"], 255, "add `optimizer=momentum`"),
        (["pgd", "embedding"], ["threat_model=patch:4"], 32, "a run of its own"),
        (["no_attack"], ["threat_model=patch:4"], 32, "does not read it"),
        (["prefill_only", "embedding"], ["threat_model=patch:4"], 32, "does not read it"),
    ],
)
def test_a_threat_model_that_nothing_reads_or_that_contradicts_is_refused(attacks, settings, epsilon, match):
    options = resolve(settings)
    with pytest.raises(UserError, match=match):
        refuse_idle(options, attacks)
        refuse_mismatch(options, attacks, epsilon)


def test_what_goes_together_is_not_refused():
    for attacks, settings, epsilon in (
        (["noise"], ["threat_model=l2:1"], 255),
        (["apgd"], ["threat_model=l2:1"], 255),
        (["pgd"], ["threat_model=l2:1", "optimizer=sign"], 255),
        (["universal"], ["threat_model=border:4"], 32),
        (["prefill"], ["threat_model=patch:4"], 8),
    ):
        refuse_idle(resolve(settings), attacks)
        refuse_mismatch(resolve(settings), attacks, epsilon)


@pytest.mark.parametrize(("threat", "match"), [("patch:400", "must lie inside"), ("border:40", "must lie in 1..")])
def test_a_threat_model_larger_than_a_picture_is_refused_before_anything_is_attacked(made, tmp_path, threat, match):
    with pytest.raises(UserError, match=f"behaviour .*{match}"):
        attack(made, "too-large", "pgd", f"threat_model={threat}", out=tmp_path / "run")
    assert not list(tmp_path.rglob("*.png"))


def test_runs_under_several_threat_models_have_no_common_worst_case(made, tmp_path):
    attack(made, "adam", "pgd", out=tmp_path / "one")
    attack(made, "border", "apgd", "threat_model=border:3", out=tmp_path / "two")
    with pytest.raises(UserError, match="the placebo and the worst case.* differ in threat_model"):
        write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    attack(made, "noise", "noise", "threat_model=border:3", out=tmp_path / "noise")
    with pytest.raises(UserError, match="the placebo .* differ in threat_model"):
        write_report([tmp_path / "one", tmp_path / "noise"], tmp_path / "report.html")
    with pytest.raises(UserError, match="`threat_model` is 'patch:20' in .* not set in|both attacked"):
        run_transfer(made / "patch:20", made / "linf", made / "behaviors.jsonl", tmp_path / "t")


def test_a_plain_run_says_nothing_new(made):
    """So that runs from before threat models could be named are gone on with, and compared."""
    assert "threat_model" not in json.loads((made / "linf" / "run.json").read_text())["recipe"]["options"]
    assert not any("distance" in c for i in read_jsonl(made / "linf" / "items.jsonl") for c in i["candidates"])
