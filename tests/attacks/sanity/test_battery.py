import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from image_attacks import Linf, gradient_health, linf_255, load_png, pgd
from mm_cb import cli
from mm_cb.attacks import saved as files
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.target import encode
from mm_cb.attacks.registry import attacks
from mm_cb.attacks.sanity.checks import checks_of, last_moves, notes_of
from mm_cb.attacks.sanity.measure import (
    ADAPTIVE,
    DIFFERENCE_STEP,
    DIRECTIONS,
    add_transfer,
    any_of,
    as_json,
    measure_arms,
    measured_once,
)
from mm_cb.attacks.sanity.run import make_setup, run_battery
from mm_cb.attacks.search import OPTIMIZERS
from mm_cb.attacks.threats import Threat
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps, write_json
from mm_cb.core.paths import data_path
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.pictures import open_picture
from mm_cb.inference.source import ModelSource
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.observations import starts_with
from mm_cb.models import last_positions, load_model
from mm_cb.report.load import load_run
from mm_cb.report.verdict import judge_run
from tests.attacks.helpers import BEHAVIORS, save_adapter
from tests.attacks.sanity.planted import CONFIG, planted

SETUPS = planted()
ASKED = [b for b in read_behaviors(data_path("miniature", "behaviors.jsonl")) if b.image][:2]


def failed(checks):
    return {check["name"].partition(" ")[0] for check in checks if not check["passed"]}


@pytest.fixture(scope="module")
def sound():
    return measure_arms(SETUPS["sound"], CONFIG)


def test_a_sound_model_and_attack_pass(sound):
    assert failed(checks_of(sound, CONFIG)) == set()


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
    assert by <= failed(checks_of(measure_arms(SETUPS[what], CONFIG), CONFIG))


def test_stored_measurements_are_those_that_were_made(sound, tmp_path):
    path = tmp_path / "part.json"
    for made in (lambda: sound, None):  # the second time nothing is made
        found = measured_once(path, made)
        assert checks_of(found, CONFIG, found) == checks_of(sound, CONFIG, sound)
        assert notes_of(found, CONFIG) == notes_of(sound, CONFIG)
        assert as_json(found) == as_json(sound)
        assert torch.equal(found.arms["pgd"].losses, sound.arms["pgd"].losses)
    path.write_bytes(b"half")
    assert as_json(measured_once(path, lambda: sound)) == as_json(sound)


def changed(found, key="losses", **arms):
    """With other losses, or what ``key`` names, of some arms."""
    made = {arm: dataclasses.replace(found.arms.get(arm, found.arms["pgd"]), **{key: v}) for arm, v in arms.items()}
    return dataclasses.replace(found, arms=found.arms | made)


def test_each_check_can_fail(sound):
    losses, none = sound.arms["pgd"].losses, torch.zeros(3, dtype=torch.bool)
    base = sound
    for kept in ({"path_gap": 2e-4}, {"path_gap": float("nan")}, {"about": ""}, {"arms": {}}):
        assert "S1" in failed(checks_of(dataclasses.replace(sound, **kept), CONFIG))
    bounds = {"clean": 0, "noise 0": 48, "pgd": 48, "iterate 12": 48, "apgd": 48, "unbounded": 255}
    for arm, bound in bounds.items():
        for far, flagged in ((bound, False), (bound + 1, True)):
            moved = changed(sound, "distances", **{arm: torch.full((3,), far)})
            assert ("S1" in failed(checks_of(moved, CONFIG))) == flagged, arm
    assert "S7" in failed(checks_of(changed(sound, pgd=losses + 1, transfer=losses), CONFIG, base))
    assert "S7" in failed(checks_of(sound, CONFIG, base)), "a transfer that was not measured is no pass"
    assert "S6" in failed(checks_of(changed(sound, random_search=losses - 1), CONFIG))
    assert "S5" in failed(checks_of(changed(sound, pgd=losses + 1), CONFIG))
    for arm in ("double_steps", "double_runs"):
        assert "S5" in failed(checks_of(changed(sound, **{arm: losses - 1}), CONFIG))
    norms, curve = sound.norms["pgd"].clone(), sound.curves["pgd"].clone()
    falling = torch.linspace(8, 1, len(curve)).unsqueeze(1).expand_as(curve)
    assert "S5" in failed(checks_of(dataclasses.replace(sound, curves={"pgd": falling}), CONFIG))
    for arm in ADAPTIVE:  # which minimise losses of their own
        assert "S5" in failed(checks_of(dataclasses.replace(sound, curves=sound.curves | {arm: falling}), CONFIG))
        still = {
            "norms": sound.norms | {arm: torch.zeros(len(curve) - 1, 3)},
            "curves": sound.curves | {arm: curve + 1},
        }
        assert "S8" in failed(checks_of(dataclasses.replace(sound, **still), CONFIG))
    norms[3, 1], curve[3, 1] = 0, 0.2
    lost = dataclasses.replace(sound, norms={"pgd": norms}, curves={"pgd": curve})
    assert "S8" in failed(checks_of(lost, CONFIG))
    curve[3, 1] = 0.05  # what is reached needs no gradient
    assert "S8" not in failed(checks_of(lost, CONFIG))
    assert "S8" in failed(checks_of(dataclasses.replace(sound, unsteady=torch.tensor([0.0, 0.1, 0.3])), CONFIG))
    for lacking in ({"norms": {}}, {"unsteady": None}):
        assert "S8" in failed(checks_of(dataclasses.replace(sound, **lacking), CONFIG))
    assert "S5" in failed(checks_of(changed(sound, "emitted", pgd=none, double_steps=~none), CONFIG))
    assert "S4" in failed(checks_of(changed(sound, unbounded=losses + 1), CONFIG))
    assert {"S2", "S10"} <= failed(checks_of(changed(sound, "emitted", any_of_k=none, noise=~none), CONFIG))


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


def test_several_pictures_are_the_best_of_each_behaviour(sound):
    first, second, both = (sound.arms[arm] for arm in ("pgd", "second_run", "double_runs"))
    assert not torch.equal(first.losses, second.losses)
    assert torch.equal(both.losses, torch.minimum(first.losses, second.losses))
    assert torch.equal(both.emitted, first.emitted | second.emitted)
    losses, emitted = torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 1.0]]), torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    pair = [dataclasses.replace(first, names=[n] * 3, losses=losses[i], emitted=emitted[i]) for i, n in enumerate("ab")]
    assert any_of(pair).names == ["a", "a", "b"]  # answered to, then of lowest loss


def test_every_search_steps_as_the_settings_say(monkeypatch):
    asked = []

    def search(*given, **settings):
        asked.append(settings["steps"])
        return pgd(*given, **settings)

    monkeypatch.setitem(OPTIMIZERS, "sign", search)
    monkeypatch.setitem(OPTIMIZERS, "adam", None)
    setup = dataclasses.replace(SETUPS["sound"], adaptive={"pgd_adaptive": SETUPS["sound"].objective})
    found = measure_arms(setup, dataclasses.replace(CONFIG, optimizer="sign"))
    # white box, twice its steps, its second run, the adaptive one, without bound
    assert asked == [12, 24, 12, 12, 12] and found.error is None
    assert torch.equal(found.arms["pgd_adaptive"].losses, found.arms["pgd"].losses)
    assert torch.equal(found.norms["pgd_adaptive"], found.norms["pgd"])


def test_pictures_that_break_by_themselves_make_no_attack(sound):
    """S2 asks the clean picture too, not the noisy ones alone."""
    assert sound.arms["any_of_k"].emitted.all()
    assert "S2" in failed(checks_of(changed(sound, "emitted", clean=torch.tensor([True, True, False])), CONFIG))


def test_what_is_no_number_is_written_as_none(tmp_path):
    """A model that overflows must end in failed checks, not in a file that cannot be written."""
    true = SETUPS["sound"]
    found = measure_arms(dataclasses.replace(true, objective=lambda pixels: true.objective(pixels) * torch.nan), CONFIG)
    found = dataclasses.replace(found, unsteady=torch.tensor([torch.nan, torch.inf, 0.5]))
    written = json.loads(dumps({"base": as_json(found), "checks": checks_of(found, CONFIG)}))["base"]
    assert written["repeat_gap"] is None and written["path_gap"] is None
    assert written["unsteady"] == [None, None, 0.5]
    again = measured_once(tmp_path / "part.json", lambda: found)
    assert {"S1", "S8"} <= failed(checks_of(again, CONFIG))


def test_transfer_is_measured_on_the_other_model(sound):
    found = measure_arms(SETUPS["sound"], CONFIG)
    add_transfer(found, SETUPS["sound"], SETUPS["sound"].clean)
    assert torch.allclose(found.arms["transfer"].losses, sound.arms["clean"].losses, atol=1e-5)
    assert "S7" not in failed(checks_of(found, CONFIG, sound))


def test_a_failed_check_makes_the_report_claim_nothing():
    checks = checks_of(measure_arms(SETUPS["quantised input"], CONFIG), CONFIG)
    verdict = judge_run([], checks)
    assert verdict.kind == "no_claim" and any("S8" in reason for reason in verdict.reasons)


def with_losses(filed, of):
    return dataclasses.replace(filed, losses=of(filed.losses))


@pytest.mark.parametrize(("off", "flagged"), [(0.01, False), (0.05, True)])
def test_files_agree_as_exactly_as_the_dtype_holds_their_losses(off, flagged):
    """Four roundings of bfloat16 are 3.1 %; in float32 both are too far off."""
    true = SETUPS["sound"]
    exact = dataclasses.replace(
        true,
        objective=lambda pixels: 1 + true.objective(pixels),
        judge=lambda *given: with_losses(true.judge(*given), lambda losses: (1 + off) * (1 + losses)),
    )
    for setup, expected in ((exact, True), (dataclasses.replace(exact, dtype="bfloat16"), flagged)):
        assert ("S1" in failed(checks_of(measure_arms(setup, CONFIG), CONFIG))) == expected


def test_one_loss_that_is_no_number_among_the_files_is_not_forgotten():
    true, asked = SETUPS["sound"], []

    def judge(*given):
        asked.append(given)
        return with_losses(true.judge(*given), lambda losses: losses * (float("nan") if len(asked) == 2 else 1))

    assert "S1" in failed(checks_of(measure_arms(dataclasses.replace(true, judge=judge), CONFIG), CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("setup")


@pytest.fixture(scope="module")
def setup(folder):
    """The battery's view of the miniature, the first two behaviours that have a picture."""
    pictures = [open_picture(b.image) for b in ASKED]
    return make_setup(Subject("base", load_model("miniature")), ASKED, pictures, folder)


@pytest.mark.parametrize("levels", [3, 60])
def test_what_is_judged_is_what_was_saved(setup, folder, monkeypatch, levels):
    """A saver that darkens: too little to leave the ball, it shows in the losses alone."""
    save = files.save

    def darkens(folder, name, pixels):
        return save(folder, name, (pixels - levels / 255).clamp(min=0) if "apgd" in name else pixels)

    monkeypatch.setattr(files, "save", darkens)
    half = Linf(16 / 255)  # in place of the longest search, and far from the bound
    monkeypatch.setattr("mm_cb.attacks.sanity.measure.apgd", lambda *a, **kw: pgd(*a, threat_model=half, steps=1))
    config = AttackConfig(steps=1, iterates=1)
    found = measure_arms(setup, config)
    (said,) = [entry for entry in checks_of(found, config) if entry["name"].startswith("S1 ")]
    assert not said["passed"] and ("further than allowed: apgd" in said["value"]) == (levels == 60)
    saved = [files.read(folder, name) for name in found.arms["apgd"].names]
    inputs = encode(setup.objective.subject, ASKED, files.images(saved), None)
    with torch.no_grad():
        assert torch.equal(found.arms["apgd"].losses, setup.objective.loss(inputs.pixel_values))
    told = [starts_with(text, b.target) for text, b in zip(said_to(setup, inputs), ASKED, strict=True)]
    assert found.arms["apgd"].emitted.tolist() == told


def said_to(setup, inputs):
    return setup.objective.subject.model.generate(inputs, 40)


def off(setup):
    health = gradient_health(setup.smooth, setup.clean, step=DIFFERENCE_STEP, directions=DIRECTIONS)
    return health.suspicious().tolist()


def test_the_checked_gradient_is_the_one_that_the_attack_follows(setup, monkeypatch):
    """The attack's pass computes less than the whole model: what goes wrong there alone must show too."""
    assert off(setup) == [False, False]
    keys, last = last_positions._keys_and_values, last_positions._last_positions
    with monkeypatch.context() as patched:
        patched.setattr(
            last_positions, "_keys_and_values", lambda *given: tuple(part.detach() for part in keys(*given))
        )
        assert any(off(setup))
    with monkeypatch.context() as patched:
        patched.setattr(last_positions, "_last_positions", lambda *a, **kw: turned_round(last(*a, **kw)))
        assert off(setup) == [True, True]


def turned_round(values):
    """The same values, with their gradient negated."""
    return 2 * values.detach() - values


def test_the_models_are_attacked_behind_the_system_text_and_through_the_backend_that_were_asked_for(
    tmp_path, monkeypatch
):
    seen = []

    def stop(subject, *rest):
        seen.append((subject.system, type(subject.model.processor.image_processor).__name__))
        raise UserError("seen")

    monkeypatch.setattr("mm_cb.attacks.sanity.run.make_setup", stop)
    command = ["attack", "check", "--model", "miniature", "--behaviors", str(data_path("miniature", "behaviors.jsonl"))]
    (tmp_path / "system.txt").write_text("be brief .")
    assert cli.run([*command, "--out", str(tmp_path / "a"), "--system", str(tmp_path / "system.txt")]) == 2
    assert cli.run([*command, "--out", str(tmp_path / "b"), "--image-backend", "torchvision"]) == 2
    assert seen == [("be brief .", "LlavaNextImageProcessorPil"), (None, "LlavaNextImageProcessor")]


def test_the_command_leaves_a_run_directory_with_checks_and_every_judged_picture(tmp_path, capsys, monkeypatch):
    line_of_the_file = data_path("miniature", "behaviors.jsonl").read_text().splitlines()[0]
    (tmp_path / "behaviors.jsonl").write_text(line_of_the_file + "\n")
    arguments = ["attack", "check", "--model", "miniature", "--behaviors", str(tmp_path / "behaviors.jsonl")]
    out, sizes = tmp_path / "out", ["--steps", "2", "--iterates", "1"]

    def stopped(*given):
        raise UserError("stopped behind the measurements")

    def measures(*given):
        raise AssertionError("nothing is to be measured")

    with monkeypatch.context() as patched:
        patched.setattr("mm_cb.attacks.sanity.run.checks_of", stopped)
        assert cli.run([*arguments, "--out", str(out), *sizes]) == 2
    with monkeypatch.context() as patched:  # what was measured before the stop is not measured again
        patched.setattr("mm_cb.attacks.sanity.run.measure_arms", measures)
        assert cli.run([*arguments, "--out", str(out), *sizes]) == 0
    assert not (out / "parts").exists()
    battery = json.loads((out / "battery.json").read_text())
    base = battery["base"]["arms"]
    arms = {"clean", "noise 0", "noise 1", "random_search", "single_step", "pgd", "iterate 2", "double_steps", "apgd"}
    arms |= {"second_run", "unbounded"}
    assert base.keys() == arms | {"noise", "any_of_k", "double_runs"}
    for arm in arms:
        distance = linf_255(out / base[arm]["names"][0], out / base["clean"]["names"][0])
        assert base[arm]["distances"] == [distance] and (distance > 0 or arm == "clean")
    assert len(list((out / "images").rglob("*.png"))) == len(arms)
    subject, asked = Subject("base", load_model("miniature")), read_behaviors(tmp_path / "behaviors.jsonl")
    again = make_setup(subject, asked, [Image.open(out / base["clean"]["names"][0])], tmp_path)
    found = again.judge("unbounded", load_png(out / base["unbounded"]["names"][0]).unsqueeze(0))
    assert found.losses.tolist() == pytest.approx(base["unbounded"]["losses"], rel=1e-4)
    assert found.emitted.tolist() == base["unbounded"]["emitted"]
    for item in map(json.loads, (out / "items.jsonl").read_text().splitlines()):
        assert (out / item["image"]).is_file() and (out / item["clean_image"]).is_file()
    checks = json.loads((out / "checks.json").read_text())
    numbers = [int(check["name"].partition(" ")[0][1:]) for check in checks]
    assert sorted(set(numbers)) == [1, 2, 4, 5, 6, 8, 10] and numbers == sorted(numbers)
    measured = json.loads((out / "results.json").read_text())["measurements"]
    assert any(m["metric"] == "target_prefix" and m["condition"] == "pgd" and m["n"] == 1 for m in measured)
    assert load_run(out).checks == checks
    write_json(out / "checks.json", [{**checks[0], "value": "another"}, *checks[1:]])
    with pytest.raises(UserError, match="changed after it was written"):
        load_run(out)
    results = json.loads((out / "results.json").read_text())
    earlier = {**json.loads((out / "run.json").read_text()), "schema": 1}  # which holds no hashes of these files
    write_json(out / "run.json", {key: value for key, value in earlier.items() if key != "seal"})
    write_json(out / "results.json", {key: results[key] for key in ("schema", "measurements")})
    for key, other in (("passed", lambda held: not held), ("value", lambda held: f"{held}0")):
        for place, one in enumerate(checks):
            write_json(out / "checks.json", [*checks[:place], {**one, key: other(one[key])}, *checks[place + 1 :]])
            with pytest.raises(UserError, match=f"must agree, but `{re.escape(one['name'])}` has the {key}"):
                load_run(out)
    write_json(out / "checks.json", [{**one, "expected": "as an earlier version has it"} for one in checks])
    load_run(out)
    stated = next(check for check in checks if check["name"].startswith("S1 "))
    assert stated["passed"] and "LlavaNextImageProcessor" in stated["value"] and "32/255" in stated["value"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "S8" in shown and "FAIL" in shown and "claims nothing" in shown and "worst case per behaviour" in shown
    with monkeypatch.context() as patched:  # the same command again measures nothing and shows the table
        patched.setattr("mm_cb.attacks.sanity.run.load_subject", None)
        assert cli.run([*arguments, "--out", str(out), *sizes]) == 0
        again = capsys.readouterr().out
        assert "finished before" in again and "S8" in again and "claims nothing" in again
        for flag, value in (("--optimizer", "lion"), ("--image-backend", "cv2")):
            assert cli.run([*arguments, "--out", str(tmp_path / "other"), flag, value]) == 2
            assert f"`{flag[2:].replace('-', '_')}` must be one of" in capsys.readouterr().err
        (out / "checks.json").unlink()
        assert cli.run([*arguments, "--out", str(out), *sizes]) == 2
        assert "lacks checks.json" in capsys.readouterr().err
    unsayable = json.loads(line_of_the_file) | {"target": "Ça va", "benign_target": True}
    (tmp_path / "behaviors.jsonl").write_text(json.dumps(unsayable) + "\n")
    with monkeypatch.context() as patched:
        patched.setattr("mm_cb.attacks.sanity.run.measure_arms", measures)
        assert cli.run([*arguments, "--out", str(tmp_path / "third"), "--steps", "2"]) == 2
    assert "cannot write its target" in capsys.readouterr().err


def test_the_adapted_model_is_shown_the_base_s_pictures_and_attacked_by_what_aims_at_it(tmp_path):
    adapter = save_adapter(tmp_path / "rr", seed=0)
    arguments = ["attack", "check", "--model", "miniature", "--adapter", str(adapter), "--steps", "1", "--count", "1"]
    arguments += ["--iterates", "0", "--behaviors", str(data_path("miniature", "behaviors.jsonl"))]
    assert cli.run([*arguments, "--out", str(tmp_path / "out")]) == 0
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    arms = {name: {item["condition"] for item in items if item["subject"] == name} for name in ("base", "rr")}
    assert arms["rr"] - arms["base"] == {"transfer", *ADAPTIVE}
    shown = {(i["subject"], i["condition"]): (tmp_path / "out" / i["image"]).read_bytes() for i in items}
    assert shown["rr", "transfer"] == shown["base", "pgd"]
    assert any(c["name"].startswith("S7 ") for c in json.loads((tmp_path / "out" / "checks.json").read_text()))


def test_a_battery_in_which_nothing_may_change_is_refused(tmp_path):
    config = AttackConfig(threat=Threat(levels=0))
    with pytest.raises(UserError, match="`--epsilon` must be at least 1/255"):
        run_battery(ModelSource("miniature"), BEHAVIORS, tmp_path / "run", config, 2)
    assert not (tmp_path / "run").exists()


def test_the_page_says_which_attacks_are_asked_whether_they_had_finished():
    page = (Path(__file__).parents[3] / "docs" / "sanity_checks.md").read_text(encoding="utf-8")
    told, others = page.partition("**What S5 looks at.**")[2].partition("\n\n")[0].split("Success is an opening.")
    assert set(re.findall(r"`(pgd\w*)`", told)) == {"pgd", *ADAPTIVE}
    stepping = {one.name for one in attacks() if one.optimises and one.in_worst_case and one.in_all}
    assert set(re.findall(r"`(\w*pgd\w*)`", others)) == stepping - {"pgd", *ADAPTIVE, "pgd_probe"}
