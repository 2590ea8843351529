import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.attacks.run import hijacked_responses
from mm_cb.attacks.transfer import Made, read_made, run_transfer, told_apart
from mm_cb.benchmarks.over_refusal.beside_attacks import read_attacked
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256
from mm_cb.core.runs import read_jsonl
from mm_cb.data.behaviors_file import read_behaviors
from tests.attacks.helpers import BEHAVIORS, edited, first_behaviors, restated, save_adapter
from tests.attacks.helpers import attack as plain_attack

LINES = BEHAVIORS.read_text().splitlines()[:2]


def attack(out, behaviors, adapter=None):
    return plain_attack(out, behaviors, adapter=adapter, steps=1, batch=8, max_new_tokens=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the base, on two adapters of one name, and on a copy of the first."""
    root = tmp_path_factory.mktemp("transfer")
    attack(root / "base", first_behaviors(root, 2))
    for seed, name in enumerate(("one", "two")):
        adapter = save_adapter(root / name / "rr", seed)
        attack(root / name / "attack", root / "behaviors.jsonl", adapter=str(adapter))
    copy = shutil.copytree(root / "one" / "rr", root / "copy" / "rr")
    attack(root / "copy" / "attack", root / "behaviors.jsonl", adapter=str(copy))
    return root


def test_pictures_of_one_adapter_are_judged_on_another_and_both_are_named(runs, tmp_path, capsys):
    run_transfer(runs / "one/attack", runs / "two/attack", runs / "behaviors.jsonl", tmp_path / "out")
    names = [f"rr ({runs / name / 'rr'})" for name in ("one", "two")]
    found = {(i["condition"], i["subject"], i["id"]): i for i in read_jsonl(tmp_path / "out" / "items.jsonl")}
    assert len(found) == 4 * len(LINES) and {subject for _, subject, _ in found} == set(names)
    for folder, name in zip(("one", "two"), names, strict=True):
        for made in read_jsonl(runs / folder / "attack" / "items.jsonl"):
            item = found[f"from_{name}", name, made["id"]]
            assert item["loss"] == pytest.approx(made["loss"], abs=1e-4) and item["outcome"] == made["outcome"]
    for id in {id for _, _, id in found}:  # each adapter judged by itself
        assert found[f"from_{names[0]}", names[0], id]["loss"] != found[f"from_{names[0]}", names[1], id]["loss"]
    shown = capsys.readouterr().out
    assert shown.count(f"{names[0]} -> {names[0]}: ") == 1 and shown.count(f"{names[1]} -> {names[0]}: ") == 1


def test_runs_of_earlier_versions_asked_repeated_behaviours_too(tmp_path, monkeypatch):
    first_behaviors(tmp_path, 1)
    behaviors = tmp_path / "behaviors.jsonl"
    (line,) = read_jsonl(behaviors)
    behaviors.write_text("".join(json.dumps(one) + "\n" for one in (line, {**line, "id": "again"})))
    with monkeypatch.context() as earlier:
        earlier.setattr("mm_cb.attacks.run.asked_once", list)
        for seed, name in enumerate(("one", "two")):
            attack(tmp_path / name / "attack", behaviors, str(save_adapter(tmp_path / name / "rr", seed)))
    run_transfer(tmp_path / "one/attack", tmp_path / "two/attack", behaviors, tmp_path / "out")
    assert {item["id"] for item in read_jsonl(tmp_path / "out" / "items.jsonl")} == {line["id"], "again"}


@pytest.mark.parametrize("second", ["one/attack", "copy/attack"])
def test_runs_on_the_very_same_adapter_are_refused(runs, tmp_path, second):
    with pytest.raises(UserError, match="two models, but .* both attacked `rr`"):
        run_transfer(runs / "one/attack", runs / second, runs / "behaviors.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["prompt", "target"])
def test_behaviours_that_keep_their_ids_but_not_their_texts_are_refused(runs, tmp_path, key, capsys):
    shutil.copytree(runs / "pictures", tmp_path / "pictures")
    lines = [json.loads(line) for line in LINES]
    lines[1][key] = "sing a song"
    behaviors = tmp_path / "behaviors.jsonl"
    behaviors.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [str(runs / "base"), str(runs / "one/attack")]
    assert cli.run(["attack", "transfer", *folders, "--behaviors", str(behaviors), "--out", str(tmp_path / "out")]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert f"`{runs / 'base'}` must have attacked the behaviours of `{behaviors}`, it attacked others" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", ["transfer", "hijacks", "beside"])
@pytest.mark.parametrize("damage", ["edited", "cut"])
def test_a_run_on_which_another_rests_is_the_one_that_was_counted(runs, tmp_path, use, damage):
    other = shutil.copytree(runs / "base", tmp_path / "other")
    content = (other / "items.jsonl").read_bytes()
    damaged = {"edited": content.replace(b'"completion": "', b'"completion": "oh ', 1), "cut": content[:40]}
    (other / "items.jsonl").write_bytes(damaged[damage])
    read = {
        "transfer": read_made,
        "hijacks": lambda folder: hijacked_responses(folder, read_behaviors(runs / "behaviors.jsonl")),
        "beside": read_attacked,
    }
    told = {
        "edited": r"items\.jsonl` was changed after it was written",
        "cut": r"items\.jsonl:1 is cut off in the middle",
    }
    with pytest.raises(UserError, match=told[damage]):
        read[use](other)


@pytest.mark.parametrize("kind", ["attacked", "clean"])
@pytest.mark.parametrize("consistent", [False, True])
def test_a_picture_that_was_replaced_is_named_and_not_judged(runs, tmp_path, kind, consistent):
    other = shutil.copytree(runs / "one/attack", tmp_path / "other")
    first, second = read_jsonl(other / "items.jsonl")
    place = "image" if kind == "attacked" else "clean_image"
    (other / first[place]).write_bytes((other / second[place]).read_bytes())
    if consistent and kind == "attacked":  # as a file of another size
        Image.new("RGB", (9, 9)).save(other / first[place])
        digest = file_sha256(other / first[place])
        edited((other / first[place]).with_suffix(".json"), lambda told: told.update(sha256=digest))
    told = "is not the picture that the run judged" if not consistent or kind == "clean" else "has another size"
    with pytest.raises(UserError, match=rf"{Path(first[place]).name}` .*{told}"):
        run_transfer(runs / "base", other, runs / "behaviors.jsonl", tmp_path / "out")


OTHER_BUDGETS = {
    **{"steps": 2, "restarts": 2, "seed": 1, "iterates": 3, "samples": 2, "chain": True, "optimizer": "sign"},
    **{"max_new_tokens": 8, "temperature": 0.5, "image_backend": "torchvision"},
}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        *((key, value, f"{key}=.* and .* {key}={value}") for key, value in OTHER_BUDGETS.items()),
        ("attack", "noise,pgd", "noise=no and .* noise=yes"),
        ("epsilon", 9, "threat=linf of 8/255 and .*linf of 9/255"),
        ("threat_model", "patch:3", "threat=linf of 8/255 and .*patch:3 of 8/255"),
        ("train", 2, "universal_train=0 and .* universal_train=2"),
        ("dtype", "bfloat16", "dtype=float32 and .* dtype=bfloat16"),
    ],
)
def test_another_budget_is_refused_by_the_first_setting_that_differs(runs, tmp_path, key, value, told):
    other = shutil.copytree(runs / "one/attack", tmp_path / "other")

    def stated(run):
        part = next((part for part in (run, run["recipe"]) if key in part), run["recipe"]["options"])
        part[key] = value

    restated(other, stated)
    with pytest.raises(UserError, match=f"one budget, but .* has .*{told}; repeat one"):
        run_transfer(runs / "base", other, runs / "behaviors.jsonl", tmp_path / "out")


def test_adaptive_attacks_stand_beside_the_attacks_that_both_runs_share(runs, tmp_path, capsys):
    """No base can be attacked by them; the row says what its pictures were made by."""
    strongest = shutil.copytree(runs / "one/attack", tmp_path / "strongest")
    restated(strongest, lambda run: run["recipe"].update(attack="pgd,pgd_adaptive"))
    run_transfer(runs / "base", strongest, runs / "behaviors.jsonl", tmp_path / "out")
    rows = capsys.readouterr().out.strip().splitlines()[-2:]
    assert rows[0].endswith("; made by pgd") and rows[1].endswith("; made by pgd,pgd_adaptive")
    made_by = {(i["condition"], i["made_by"]) for i in read_jsonl(tmp_path / "out" / "items.jsonl")}
    assert made_by == {("from_base", "pgd"), ("from_rr", "pgd,pgd_adaptive")}
    given = {(i["condition"], i["subject"]): i["given"] for i in read_jsonl(tmp_path / "out" / "items.jsonl")}
    assert given == {  # a model's own pictures were given what the best informed of their attacks was
        **{("from_base", "base"): "opening", ("from_rr", "rr"): "supplied text"},
        **{("from_base", "rr"): "base's pictures", ("from_rr", "base"): "base's pictures"},
    }
    restated(strongest, lambda run: run["recipe"].update(attack="apgd,pgd_adaptive"))
    with pytest.raises(UserError, match="one budget, but .*base` has pgd=yes and .*strongest` pgd=no"):
        run_transfer(runs / "base", strongest, runs / "behaviors.jsonl", tmp_path / "out")


@pytest.mark.parametrize("aimed", ["pgd_adaptive", "pgd_probe"])
def test_attacks_aimed_at_what_defends_one_model_are_no_part_of_the_shared_budget(runs, aimed):
    plain = read_made(runs / "base")
    assert replace(plain, recipe={**plain.recipe, "attack": f"pgd,{aimed}"}).budget == plain.budget


def test_one_model_with_and_without_a_safety_prompt_is_two_subjects():
    def made(system, name):
        return Made(Path(name), {"inputs": {}}, {"model": "m", "adapter": None, "system": system}, {}, {}, name)

    both = made(None, "base"), made("be kind", "base+safety_prompt")
    assert [one.name for one in told_apart(*both)] == ["base", "base+safety_prompt"]


def test_another_clean_picture_of_one_behaviour_is_refused_by_its_id(runs, tmp_path):
    other = shutil.copytree(runs / "one/attack", tmp_path / "other")
    first, second = sorted((other / "images").glob("*.clean.png"))
    shutil.copyfile(first, second)
    with pytest.raises(UserError, match=f"{re.escape(second.name)}` is not the picture that the run judged"):
        run_transfer(runs / "base", other, runs / "behaviors.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_drawing_is_judged_with_the_prompt_that_was_sent_beside_it(runs, tmp_path):
    folders = {"base": tmp_path / "base", "rr": tmp_path / "rr"}
    for name, adapter in (("base", None), ("rr", str(runs / "one" / "rr"))):
        plain_attack(folders[name], runs / "behaviors.jsonl", "typographic", adapter=adapter, max_new_tokens=4)
    run_transfer(*folders.values(), runs / "behaviors.jsonl", tmp_path / "out")
    found = {(i["condition"], i["subject"], i["id"]): i for i in read_jsonl(tmp_path / "out" / "items.jsonl")}
    for name, folder in folders.items():
        for made in read_jsonl(folder / "items.jsonl"):
            item = found[f"from_{name}", name, made["id"]]
            assert item["completion"] == made["completion"]
            assert item["loss"] == pytest.approx(made["loss"], abs=1e-4)
