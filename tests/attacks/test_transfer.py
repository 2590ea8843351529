import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mm_cb import cli
from mm_cb.attacks.run import run_attack
from mm_cb.attacks.transfer import run_transfer
from mm_cb.core.errors import UserError
from mm_cb.core.paths import data_path, safe_id
from mm_cb.core.runs import read_jsonl, read_run, write_json
from mm_cb.models import load_model
from mm_cb.models.fingerprint import remember_base

LINES = data_path("miniature", "behaviors.jsonl").read_text().splitlines()[:2]


def save_adapter(folder, seed):
    """An adapter of the miniature's with random weights, as `mm-cb train` leaves one."""
    torch.manual_seed(seed)
    model = load_model("miniature").model
    paths = [name for name, _ in model.named_modules() if name.endswith("language_model.layers.1.mlp.up_proj")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=paths, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "miniature"
    adapted.save_pretrained(folder)
    remember_base(folder, "miniature")
    return folder


def attack(out, behaviors, **changes):
    fixed = {"model": "miniature", "adapter": None, "behaviors": behaviors, "attack": "pgd", "epsilon": 8, "steps": 1}
    run_attack(**fixed | {"restarts": 1, "seed": 0, "overrides": ["max_new_tokens=4"], "out": out} | changes)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the base, on two adapters of one name, and on a copy of the first."""
    root = tmp_path_factory.mktemp("transfer")
    shutil.copytree(data_path("miniature", "pictures"), root / "pictures")
    (root / "behaviors.jsonl").write_text("\n".join(LINES) + "\n")
    attack(root / "base", root / "behaviors.jsonl")
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


@pytest.mark.parametrize("second", ["one/attack", "copy/attack"])
def test_runs_on_the_very_same_adapter_are_refused(runs, tmp_path, second):
    with pytest.raises(UserError, match="two models, but .* both attacked `rr`"):
        run_transfer(runs / "one/attack", runs / second, runs / "behaviors.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["prompt", "target"])
def test_behaviours_that_keep_their_ids_but_not_their_texts_are_refused(runs, tmp_path, key, capsys):
    shutil.copytree(runs / "pictures", tmp_path / "pictures")
    lines = [json.loads(line) for line in LINES]
    expected, lines[1][key] = lines[1][key], "sing a song"
    behaviors = tmp_path / "behaviors.jsonl"
    behaviors.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [str(runs / "base"), str(runs / "one/attack")]
    assert cli.run(["attack", "transfer", *folders, "--behaviors", str(behaviors), "--out", str(tmp_path / "out")]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert f"the {key} of `{lines[1]['id']}` is {expected!r}" in told and "got 'sing a song'; give that file" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("attack", "noise,pgd"), ("epsilon", 9), ("steps", 2), ("restarts", 2), ("seed", 1)),
        *(("iterates", 3), ("samples", 2), ("chain", True), ("optimizer", "sign")),
        *(("early_stop", True), ("max_new_tokens", 8), ("temperature", 0.5), ("train", 2), ("dtype", "bfloat16")),
        ("image_backend", "torchvision"),
    ],
)
def test_another_budget_is_refused_by_the_first_setting_that_differs(runs, tmp_path, key, value):
    other = shutil.copytree(runs / "one/attack", tmp_path / "other")
    run = read_run(other)
    holder = next((part for part in (run, run["recipe"]) if key in part), run["recipe"]["options"])
    before = holder.get(key)
    holder[key] = value
    write_json(other / "run.json", run)
    was = "not set" if before is None else repr(before)
    with pytest.raises(UserError, match=f"one budget, but `{key}` is {was} in .* and {value!r} in .*; repeat one"):
        run_transfer(runs / "base", other, runs / "behaviors.jsonl", tmp_path / "out")


def test_adaptive_attacks_stand_beside_the_attacks_that_both_runs_share(runs, tmp_path, capsys):
    """No base can be attacked by them; the row says what its pictures were made by."""
    strongest = shutil.copytree(runs / "one/attack", tmp_path / "strongest")
    run = read_run(strongest)
    run["recipe"]["attack"] = "pgd,pgd_adaptive"
    write_json(strongest / "run.json", run)
    run_transfer(runs / "base", strongest, runs / "behaviors.jsonl", tmp_path / "out")
    rows = capsys.readouterr().out.strip().splitlines()[-2:]
    assert rows[0].endswith("; made by pgd") and rows[1].endswith("; made by pgd,pgd_adaptive")
    made_by = {(i["condition"], i["made_by"]) for i in read_jsonl(tmp_path / "out" / "items.jsonl")}
    assert made_by == {("from_base", "pgd"), ("from_rr", "pgd,pgd_adaptive")}
    run["recipe"]["attack"] = "apgd,pgd_adaptive"
    write_json(strongest / "run.json", run)
    with pytest.raises(UserError, match="one budget, but `attack` is 'pgd' in .* and 'apgd' in"):
        run_transfer(runs / "base", strongest, runs / "behaviors.jsonl", tmp_path / "out")


def test_another_clean_picture_of_one_behaviour_is_refused_by_its_id(runs, tmp_path):
    other = shutil.copytree(runs / "one/attack", tmp_path / "other")
    first, second = sorted((other / "images").glob("*.clean.png"))
    shutil.copyfile(first, second)
    names = {safe_id(json.loads(line)["id"]): json.loads(line)["id"] for line in LINES}
    with pytest.raises(UserError, match=f"that of `{names[second.name.removesuffix('.clean.png')]}` is another file"):
        run_transfer(runs / "base", other, runs / "behaviors.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
