import dataclasses
import json

import pytest
import torch
from PIL import Image

from image_attacks import Linf, gradient_health, linf_255, load_png, pgd, save_png
from mm_cb.attacks.sanity import planted
from mm_cb.attacks.sanity.bed import make_bed
from mm_cb.attacks.sanity.checks import ADAPTIVE, check, checks_of, last_moves
from mm_cb.attacks.sanity.measure import DIFFERENCE_STEP, DIRECTIONS, Sizes, add_transfer, measure_bed
from mm_cb.attacks.sanity.store import measured_once, plain
from mm_cb.attacks.search import OPTIMIZERS
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.paths import data_path
from mm_cb.data.behaviors_file import open_picture, read_behaviors
from mm_cb.inference.subjects import Subject
from mm_cb.models import last_positions, load_model
from mm_cb.report.verdict import judge_run

SIZES = Sizes(epsilon=48, steps=12, iterates=2, sweep=(0, 64, 255))
BEDS = planted.planted()


def failed(checks):
    return {check["name"].partition(" ")[0] for check in checks if not check["passed"]}


@pytest.fixture(scope="module")
def sound():
    return measure_bed(BEDS["sound"], SIZES)


def test_a_sound_model_and_attack_pass(sound):
    assert failed(checks_of(sound, SIZES)) == set()


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("detached gradient", {"S8", "S6", "S10"}),
        ("no gradient", {"S8", "S6", "S10"}),
        ("quantised input", {"S8", "S6", "S10"}),
        ("wrong gradient", {"S8", "S6", "S4"}),
        ("noise in the model", {"S8"}),
        ("another path for users", {"S1"}),
    ],
)
def test_planted_broken_models_are_flagged(what, by):
    assert by <= failed(checks_of(measure_bed(BEDS[what], SIZES), SIZES))


def test_the_planted_check_fails_when_a_broken_model_is_not_flagged(monkeypatch):
    assert planted.planted_check()["passed"]
    monkeypatch.setattr(planted, "planted", lambda: {"sound": BEDS["sound"], "broken": BEDS["sound"]})
    check = planted.planted_check()
    assert not check["passed"] and "broken: not flagged" in check["value"]


def test_the_sweep_never_gets_worse_with_a_larger_budget(sound):
    losses = torch.stack([losses for losses, _ in sound.sweep.values()])
    emitted = torch.stack([emitted for _, emitted in sound.sweep.values()]).int()
    assert (losses.diff(dim=0) <= 0).all() and (emitted.diff(dim=0) >= 0).all()
    assert list(sound.sweep) == [0, 64, 255] and torch.equal(losses[0], sound.losses["clean"])


def test_stored_measurements_are_those_that_were_made(sound, tmp_path):
    path = tmp_path / "part.safetensors"
    for made in (lambda: sound, None):  # the second time nothing is made
        found = measured_once(path, made)
        assert checks_of(found, SIZES, found) == checks_of(sound, SIZES, sound)
        assert json.dumps(plain(found)) == json.dumps(plain(sound))
        assert torch.equal(found.images["pgd"], sound.images["pgd"]) and torch.equal(found.clean, sound.clean)
    path.write_bytes(b"half")
    assert measured_once(path, lambda: sound) is sound


def changed(found, **arms):
    return dataclasses.replace(found, losses=found.losses | {k: v for k, v in arms.items()})


def test_each_check_can_fail(sound):
    worse = sound.losses["pgd"] + 1
    emitted = {arm: torch.zeros_like(values) for arm, values in sound.emitted.items()}
    base = sound
    for kept in ({"path_gap": 2e-4}, {"path_gap": float("nan")}, {"about": ""}, {"files": {}}):
        assert "S1" in failed(checks_of(dataclasses.replace(sound, **kept), SIZES))
    for arm, bound in (("clean", 0), ("noise 0", 48), ("pgd", 48), ("iterate 12", 48), ("apgd", 48), ("sweep 64", 64)):
        for far, flagged in ((bound, False), (bound + 1, True)):
            moved = dataclasses.replace(sound.files[arm], distances=torch.full((3,), far))
            changed_files = dataclasses.replace(sound, files=sound.files | {arm: moved})
            assert ("S1" in failed(checks_of(changed_files, SIZES))) == flagged, arm
    transferred = changed(changed(sound, pgd=worse), transfer=sound.losses["pgd"])
    assert "S7" in failed(checks_of(transferred, SIZES, base))
    assert "S7" in failed(checks_of(sound, SIZES, base)), "a transfer that was not measured is no pass"
    assert "S6" in failed(checks_of(changed(sound, random_search=sound.losses["pgd"] - 1), SIZES))
    assert "S5" in failed(checks_of(changed(sound, pgd=worse), SIZES))
    for arm in ("double_steps", "double_runs"):
        assert "S5" in failed(checks_of(changed(sound, **{arm: sound.losses["pgd"] - 1}), SIZES))
    norms, curve = sound.norms["pgd"].clone(), sound.curves["pgd"].clone()
    falling = torch.linspace(8, 1, len(curve)).unsqueeze(1).expand_as(curve)
    assert "S5" in failed(checks_of(dataclasses.replace(sound, curves={"pgd": falling}), SIZES))
    for arm in ADAPTIVE:  # which minimise losses of their own
        assert "S5" in failed(checks_of(dataclasses.replace(sound, curves=sound.curves | {arm: falling}), SIZES))
        still = {
            "norms": sound.norms | {arm: torch.zeros(len(curve) - 1, 3)},
            "curves": sound.curves | {arm: curve + 1},
        }
        assert "S8" in failed(checks_of(dataclasses.replace(sound, **still), SIZES))
    norms[3, 1], curve[3, 1] = 0, 0.2
    lost = dataclasses.replace(sound, norms={"pgd": norms}, curves={"pgd": curve})
    assert "S8" in failed(checks_of(lost, SIZES))
    curve[3, 1] = 0.05  # what is reached needs no gradient
    assert "S8" not in failed(checks_of(lost, SIZES))
    assert "S8" in failed(checks_of(dataclasses.replace(sound, unsteady=torch.tensor([0.0, 0.1, 0.3])), SIZES))
    for lacking in ({"norms": {}}, {"unsteady": None}):
        assert "S8" in failed(checks_of(dataclasses.replace(sound, **lacking), SIZES))
    assert "S12" in failed(checks_of(sound, SIZES, base)), "no adaptive attack on an adapter"
    adaptive = dataclasses.replace(sound, emitted=sound.emitted | {arm: sound.emitted["pgd"] for arm in ADAPTIVE})
    assert "S12" not in failed(checks_of(adaptive, SIZES, base)) | failed(checks_of(sound, SIZES))
    arms = {arm: values for arm, values in sound.emitted.items() if arm != "apgd"}
    assert "S12" in failed(checks_of(dataclasses.replace(sound, emitted=arms), SIZES))
    none = sound.emitted | {"pgd": torch.zeros(3, dtype=torch.bool), "double_steps": torch.ones(3, dtype=torch.bool)}
    assert "S5" in failed(checks_of(dataclasses.replace(sound, emitted=none), SIZES))
    assert "S4" in failed(checks_of(changed(sound, unbounded=worse), SIZES))
    assert {"S2", "S10"} <= failed(checks_of(dataclasses.replace(sound, emitted=emitted | noisy(sound)), SIZES))
    nothing = dataclasses.replace(sound, sweep={255: (sound.losses["pgd"], emitted["pgd"])})
    assert "S3" in failed(checks_of(nothing, SIZES))
    assert "S11" in failed(checks_of(sound, dataclasses.replace(SIZES, iterates=0)))


def test_last_moves_are_shares_of_what_the_best_loss_has_fallen():
    steady, late = torch.full((30,), 2.0), torch.cat([torch.full((24,), 5.0), torch.full((6,), 4.0)])
    spiked = torch.cat([torch.tensor([4.0, 90.0]), torch.linspace(4, 1, 10), torch.ones(18)])
    half = torch.cat([torch.linspace(3, 2, 15), torch.full((14,), 2.0), torch.ones(1)])
    moves = last_moves(torch.stack([steady, late, spiked, half], dim=1))
    torch.testing.assert_close(moves, torch.tensor([0.0, 1.0, 0.0, 0.5]))


@pytest.mark.parametrize(("steps_ago", "moved"), [(1, 1.0), (10, 1.0), (11, 0.0)])
def test_ten_last_steps_are_ten_and_not_nine(steps_ago, moved):
    dropped = torch.cat([torch.full((31 - steps_ago,), 5.0), torch.ones(steps_ago)])
    assert last_moves(dropped.unsqueeze(1)).item() == moved


def test_the_second_run_starts_elsewhere_and_the_better_of_both_counts(sound):
    first, second = sound.files["pgd"], sound.files["second_run"]
    assert not torch.equal(sound.losses["pgd"], second.losses)
    assert torch.equal(sound.losses["double_runs"], torch.minimum(first.losses, second.losses))
    assert torch.equal(sound.emitted["double_runs"], first.emitted | second.emitted)


def test_every_search_steps_as_the_settings_say(monkeypatch):
    asked = []

    def search(*given, **settings):
        asked.append(settings["steps"])
        return pgd(*given, **settings)

    monkeypatch.setitem(OPTIMIZERS, "sign", search)
    monkeypatch.setitem(OPTIMIZERS, "adam", None)
    bed = dataclasses.replace(BEDS["sound"], adaptive={"pgd_adaptive": BEDS["sound"].objective})
    found = measure_bed(bed, dataclasses.replace(SIZES, optimizer="sign"))
    # white box, twice its steps, its second run, the adaptive one, without bound, and the sweep
    assert asked == [12, 24, 12, 12, 12, 12, 12] and found.error is None
    assert torch.equal(found.losses["pgd_adaptive"], found.losses["pgd"])
    assert torch.equal(found.norms["pgd_adaptive"], found.norms["pgd"])


def test_pictures_that_break_by_themselves_make_no_attack(sound):
    """S2 asks the clean picture too, not the noisy ones alone."""
    assert sound.emitted["any_of_k"].all()
    emitted = sound.emitted | {"clean": torch.tensor([True, True, False])}
    assert "S2" in failed(checks_of(dataclasses.replace(sound, emitted=emitted), SIZES))


def test_what_is_no_number_is_written_as_none():
    """A model that overflows must end in failed checks, not in a file that cannot be written."""
    true = BEDS["sound"]
    found = measure_bed(dataclasses.replace(true, objective=lambda pixels: true.objective(pixels) * torch.nan), SIZES)
    found = dataclasses.replace(found, unsteady=torch.tensor([torch.nan, torch.inf, 0.5]))
    written = json.loads(dumps({"base": plain(found), "checks": checks_of(found, SIZES)}))["base"]
    assert written["repeat_gap"] is None and written["path_gap"] is None
    assert written["unsteady"] == [None, None, 0.5]


def noisy(sound):
    return {"noise": torch.ones_like(sound.emitted["noise"])}


def test_transfer_is_measured_on_the_other_model(sound):
    found = measure_bed(BEDS["sound"], SIZES)
    add_transfer(found, BEDS["sound"], sound.images["pgd"])
    assert torch.allclose(found.losses["transfer"], sound.losses["pgd"], atol=1e-5)
    assert "S7" not in failed(checks_of(found, SIZES, sound))


def test_a_failed_check_makes_the_report_claim_nothing():
    checks = checks_of(measure_bed(BEDS["quantised input"], SIZES), SIZES)
    verdict = judge_run([], checks)
    assert verdict.kind == "no_claim" and any("S8" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("off", "flagged"), [(0.01, False), (0.05, True)])
def test_files_agree_as_exactly_as_the_dtype_holds_their_losses(off, flagged):
    """Four roundings of bfloat16 are 3.1 %; in float32 both are too far off."""
    true = BEDS["sound"]
    exact = dataclasses.replace(
        true,
        objective=lambda pixels: 1 + true.objective(pixels),
        filed=lambda pixels: (1 + off) * (1 + true.filed(pixels)),
    )
    for bed, expected in ((exact, True), (dataclasses.replace(exact, dtype="bfloat16"), flagged)):
        assert ("S1" in failed(checks_of(measure_bed(bed, SIZES), SIZES))) == expected


def test_one_loss_that_is_no_number_among_the_files_is_not_forgotten():
    true, asked = BEDS["sound"], []

    def filed(pixels):
        asked.append(pixels)
        return true.filed(pixels) * (float("nan") if len(asked) == 2 else 1)

    assert "S1" in failed(checks_of(measure_bed(dataclasses.replace(true, filed=filed), SIZES), SIZES))


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """The battery's view of the miniature, the first two behaviours that have a picture."""
    asked = [b for b in read_behaviors(data_path("miniature", "behaviors.jsonl")) if b.image][:2]
    pictures = [open_picture(b.image) for b in asked]
    return make_bed(Subject("base", load_model("miniature")), asked, pictures, tmp_path_factory.mktemp("bed"))


@pytest.mark.parametrize("levels", [3, 60])
def test_what_is_judged_is_what_was_saved(bed, monkeypatch, levels):
    """A saver that darkens: too little to leave the ball, it shows in the losses alone."""
    monkeypatch.setattr(
        "mm_cb.attacks.sanity.bed.save_png",
        lambda pixels, path: save_png((pixels - levels / 255).clamp(min=0) if "apgd" in str(path) else pixels, path),
    )
    half = Linf(16 / 255)  # in place of the longest search, and far from the bound
    monkeypatch.setattr("mm_cb.attacks.sanity.measure.apgd", lambda *a, **kw: pgd(*a, threat_model=half, steps=1))
    asked = []
    watched = dataclasses.replace(bed, emitted=lambda pixels: asked.append(pixels) or [False] * len(pixels))
    sizes = Sizes(epsilon=32, steps=1, iterates=1, sweep=(0,))
    found = measure_bed(watched, sizes)
    (said,) = [entry for entry in checks_of(found, sizes) if entry["name"].startswith("S1 ")]
    assert not said["passed"] and ("further than allowed: apgd" in said["value"]) == (levels == 60)
    with torch.no_grad():
        assert torch.equal(found.losses["apgd"], bed.filed(found.images["apgd"]))
    assert any(torch.equal(found.images["apgd"], pixels) for pixels in asked)


def off(bed):
    health = gradient_health(bed.smooth, bed.clean, step=DIFFERENCE_STEP, directions=DIRECTIONS)
    return health.suspicious().tolist()


def test_the_checked_gradient_is_the_one_that_the_attack_follows(bed, monkeypatch):
    """The attack's pass computes less than the whole model: what goes wrong there alone must show too."""
    assert off(bed) == [False, False]
    keys, last = last_positions._keys_and_values, last_positions._last_positions
    with monkeypatch.context() as patched:
        patched.setattr(
            last_positions, "_keys_and_values", lambda *given: tuple(part.detach() for part in keys(*given))
        )
        assert any(off(bed))
    with monkeypatch.context() as patched:
        patched.setattr(last_positions, "_last_positions", lambda *a, **kw: turned_round(last(*a, **kw)))
        assert off(bed) == [True, True]


def turned_round(values):
    """The same values, with their gradient negated."""
    return 2 * values.detach() - values


@pytest.mark.parametrize(("first", "shared"), [(2, 0), (1, 1)])
def test_settings_may_be_chosen_on_behaviors_of_the_file_that_are_not_reported(
    sound, tmp_path, monkeypatch, first, shared
):
    from mm_cb.attacks.sanity import run as battery_run

    lines = data_path("miniature", "behaviors.jsonl").read_text().splitlines()[:4]
    blank = [json.dumps(json.loads(line) | {"image": None}) for line in lines]
    (tmp_path / "behaviors.jsonl").write_text("\n".join(blank))
    (tmp_path / "validation.jsonl").write_text("\n".join(blank[first : first + 2]))
    monkeypatch.setattr(battery_run, "measured_once", lambda path, make: sound)
    monkeypatch.setattr(battery_run, "planted_check", lambda: check("S9", True, "", "", ""))
    checks = battery_run.run_battery(
        model="miniature",
        adapter=None,
        behaviors=tmp_path / "behaviors.jsonl",
        out=tmp_path / "out",
        epsilon=48,
        overrides=["behaviors=2", f"validation={tmp_path / 'validation.jsonl'}"],
    )
    (found,) = [entry for entry in checks if entry["name"].startswith("S13")]
    assert found["value"] == f"2 validation behaviours, {shared} of them reported too"
    assert found["passed"] == (shared == 0)


def test_the_models_are_attacked_behind_the_system_text_and_through_the_backend_that_were_asked_for(
    tmp_path, monkeypatch
):
    from mm_cb import cli

    seen = []

    def stop(subject, *rest):
        seen.append((subject.system, type(subject.model.processor.image_processor).__name__))
        raise UserError("seen")

    monkeypatch.setattr("mm_cb.attacks.sanity.run.make_bed", stop)
    command = ["attack", "check", "--model", "miniature", "--behaviors", str(data_path("miniature", "behaviors.jsonl"))]
    (tmp_path / "system.txt").write_text("be brief .")
    assert cli.run([*command, "--out", str(tmp_path / "a"), "--system", str(tmp_path / "system.txt")]) == 2
    assert cli.run([*command, "--out", str(tmp_path / "b"), "image_backend=torchvision"]) == 2
    assert seen == [("be brief .", "LlavaNextImageProcessorPil"), (None, "LlavaNextImageProcessor")]


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ({}, True),
        ({"steps": 1000}, True),
        ({"steps": 99}, False),
        ({"iterates": 6}, False),
        ({"optimizer": "momentum"}, False),
        ({"image_backend": "torchvision"}, True),
    ],
)
def test_without_validation_behaviours_only_patience_may_be_added(changed, passed):
    from mm_cb.attacks.sanity import run as battery_run

    found = battery_run._held_out(None, battery_run.Settings(**changed), [])
    assert found["passed"] is passed


def test_the_command_leaves_a_run_directory_with_checks_and_plots(tmp_path, capsys, monkeypatch):
    from mm_cb import cli

    line_of_the_file = data_path("miniature", "behaviors.jsonl").read_text().splitlines()[0]
    (tmp_path / "behaviors.jsonl").write_text(line_of_the_file + "\n")
    arguments = ["attack", "check", "--model", "miniature", "--behaviors", str(tmp_path / "behaviors.jsonl")]
    out = tmp_path / "out"

    def stopped():
        raise UserError("stopped behind the measurements")

    with monkeypatch.context() as patched:
        patched.setattr("mm_cb.attacks.sanity.run.planted_check", stopped)
        assert cli.run([*arguments, "--out", str(out), "steps=2", "iterates=1", "sweep=0,255"]) == 2
    with monkeypatch.context() as patched:  # what was measured before the stop is not measured again
        patched.setattr("mm_cb.attacks.sanity.run.measure_bed", None)
        assert cli.run([*arguments, "--out", str(out), "steps=2", "iterates=1", "sweep=0,255"]) == 0
    assert not (out / "parts").exists()
    files = json.loads((out / "battery.json").read_text())["base"]["files"]
    arms = {"clean", "noise 0", "noise 1", "random_search", "single_step", "pgd", "iterate 2", "double_steps", "apgd"}
    assert files.keys() == arms | {"second_run", "unbounded", "sweep 255"}
    for arm, (line,) in files.items():
        assert line["distance"] == linf_255(out / line["image"], out / files["clean"][0]["image"])
        assert line["distance"] > 0 or arm == "clean"
    assert len(list((out / "images").rglob("*.png"))) == len(files)
    base, asked = Subject("base", load_model("miniature")), read_behaviors(tmp_path / "behaviors.jsonl")
    again = make_bed(base, asked, [Image.open(out / files["clean"][0]["image"])], tmp_path)
    with torch.no_grad():
        (line,) = files["sweep 255"]
        pixels = load_png(out / line["image"]).unsqueeze(0)
        assert abs(float(again.filed(pixels)) - line["loss"]) <= 1e-4 and again.emitted(pixels) == [line["emitted"]]
    for item in map(json.loads, (out / "items.jsonl").read_text().splitlines()):
        assert (out / item["image"]).is_file() and (out / item["clean_image"]).is_file()
    checks = json.loads((out / "checks.json").read_text())
    numbers = [int(check["name"].partition(" ")[0][1:]) for check in checks]
    assert sorted(set(numbers)) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13] and numbers == sorted(numbers)
    assert "S13" in failed(checks)  # fewer steps, and no validation set was named
    assert {p.name for p in (out / "plots").iterdir()} == {"epsilon.svg", "epsilon.png", "steps.svg", "steps.png"}
    measured = json.loads((out / "results.json").read_text())["measurements"]
    assert any(m["metric"] == "target_prefix" and m["condition"] == "pgd" and m["n"] == 1 for m in measured)
    stated = next(check for check in checks if check["name"].startswith("S1 "))
    assert stated["passed"] and "LlavaNextImageProcessor" in stated["value"] and "32/255" in stated["value"]
    shown = capsys.readouterr().out
    assert "S8" in shown and "FAIL" in shown and "claims nothing" in shown
    with monkeypatch.context() as patched:  # the same command again measures nothing and shows the table
        patched.setattr("mm_cb.attacks.sanity.run.load_model", None)
        assert cli.run([*arguments, "--out", str(out), "steps=2", "iterates=1", "sweep=0,255"]) == 0
        again = capsys.readouterr().out
        assert "finished before" in again and "S8" in again and "claims nothing" in again
        assert cli.run([*arguments, "--out", str(tmp_path / "other"), "validation=none.jsonl"]) == 2
        assert "none.jsonl" in capsys.readouterr().err
    assert cli.run([*arguments, "--out", str(tmp_path / "other"), "stepz=2"]) == 2
    assert "did you mean `steps`" in capsys.readouterr().err
    assert cli.run([*arguments, "--out", str(tmp_path / "other"), "steps=2", "steps=3"]) == 2
    assert "`steps` must be set once, it comes again as `3`" in capsys.readouterr().err
    for bad in ("optimizer=lion", "image_backend=cv2"):
        assert cli.run([*arguments, "--out", str(tmp_path / "other"), bad]) == 2
        assert f"`{bad.partition('=')[0]}` must be one of" in capsys.readouterr().err
    unsayable = json.loads(line_of_the_file) | {"target": "Ça va", "benign_target": True}
    (tmp_path / "behaviors.jsonl").write_text(json.dumps(unsayable) + "\n")
    with monkeypatch.context() as patched:
        patched.setattr("mm_cb.attacks.sanity.run.measure_bed", None)
        assert cli.run([*arguments, "--out", str(tmp_path / "third"), "steps=2"]) == 2
    assert "cannot write its target" in capsys.readouterr().err
