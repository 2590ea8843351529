"""docs/add_an_attack.md: its example runs, and what it leaves is a run like any other."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from image_attacks import pgd
from mm_cb import cli
from mm_cb.attacks import registry
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.target import TargetObjective, encode, preprocessing
from mm_cb.attacks.refused_settings import refuse_idle
from mm_cb.attacks.registry import AttackEntry, register_attack
from mm_cb.attacks.run import attack
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from mm_cb.metrics.results import find, measure, read_results, write_results
from tests.attacks.helpers import edited, first_behaviors, restated

PAGE = Path(__file__).parents[2] / "docs" / "add_an_attack.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page's example, run with three steps; the table is put back, as another process would have it."""
    folder = tmp_path_factory.mktemp("own")
    first_behaviors(folder, 2)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert "steps=100" in code
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
        space = {}
        exec(code.replace("steps=100", "steps=3, max_new_tokens=4"), space)
        rows = verify_run("runs/mine")
    return folder / "runs/mine", space, rows


def test_the_example_is_searched_saved_checked_and_verified(made):
    folder, space, rows = made
    assert len(rows) == 4 and not any(row.disagreements for row in rows)
    assert {m.condition for m in space["run"].measurements} >= {"noise", "no_refusal", "worst_case"}
    assert all(check["passed"] for check in json.loads((folder / "checks.json").read_text()))
    for item in (i for i in read_jsonl(folder / "items.jsonl") if i["condition"] == "no_refusal"):
        (one,) = item["candidates"]
        assert one["objective_file"] == pytest.approx(one["objective_logged"], abs=1e-4)
        told = json.loads((folder / one["image"]).with_suffix(".json").read_text())
        assert told["objective"] == "AwayFromRefusal" and min(told["curve"]) == told["curve"][told["selected_step"]]
        assert 0 < item["loss"] - one["objective_file"] <= 5 + 1e-4  # the refusal's loss, which is subtracted
    assert json.loads((folder / "protocol.json").read_text())["labels"]["no_refusal"] == "no-refusal PGD"


def test_another_process_reports_it_and_says_that_it_cannot_verify_it(made, tmp_path, capsys):
    folder, _, _ = made
    assert "no_refusal" not in registry._ATTACKS
    assert cli.run(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "no-refusal PGD" in page and "worst of all attacks" in page
    capsys.readouterr()
    assert cli.run(["attack", "verify", str(folder)]) == 2
    assert "unknown attack `no_refusal`" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [(True, 100.0), (False, 0.0)])
def test_its_own_flag_says_whether_it_counts_in_the_worst_case(flag, value):
    fixed = {"id": "a", "metric": "compliance", "subject": "base", "split": "all", "gibberish": False}
    items = [
        fixed | {"condition": "pgd", "outcome": "refusal", "worst_case": True},
        fixed | {"condition": "somebodys_own", "outcome": "harmful", "worst_case": flag},
    ]
    assert find(measure(items, pairs=[]), "base", "compliance", "worst_case").value == value


def test_a_forged_loss_of_its_own_objective_is_noticed(made, monkeypatch):
    folder, space, _ = made
    monkeypatch.setattr(registry, "_ATTACKS", registry._ATTACKS | {"no_refusal": entry(space["AwayFromRefusal"])})
    path = sorted((folder / "images").glob("*/no_refusal-*.json"))[0]
    held = [path, folder / "items.jsonl", folder / "results.json"]
    honest = [file.read_bytes() for file in held]
    told = json.loads(honest[0])
    edited(path, lambda one: one.update(weight=0.5))
    verify_run(folder)  # of an attack's own objective the settings count, not what its picture's JSON says of a weight
    edited(path, lambda one: one.update(objective_file=told["objective_file"] + 1))
    (folder / "items.jsonl").write_bytes(
        honest[1].replace(
            f'"objective_file": {told["objective_file"]}'.encode(),
            f'"objective_file": {told["objective_file"] + 1}'.encode(),
        )
    )
    write_results(folder / "results.json", read_results(folder / "results.json"))  # it has the hash of the items
    with pytest.raises(UserError, match="objective_file .* recorded"):
        verify_run(folder)
    for file, content in zip(held, honest, strict=True):
        file.write_bytes(content)


def entry(objective, **more):
    return AttackEntry(
        **{"name": "no_refusal", "about": "own", "label": "own", "search": "pgd", "objective": objective} | more
    )


def test_a_registered_name_replaces_an_old_one_and_an_adapter_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    register_attack(entry(TargetObjective, name="own", needs_adapter=True))
    with pytest.raises(UserError, match="`--adapter`"):
        registry.chosen_attacks("own", adapted=False)
    register_attack(entry(TargetObjective, name="own"))
    assert registry.chosen_attacks("own", adapted=False) == ["own"] and "own" in registry._ATTACKS
    for name in ("pgd", "PGD", "all"):
        with pytest.raises(UserError, match=f"the attack `{name}` has the name of mm-cb's own .*: rename yours"):
            register_attack(entry(TargetObjective, name=name))


def test_a_row_brings_its_own_optimiser(tmp_path, monkeypatch):
    seen = []

    def halved(*given, **told):
        seen.append(told["steps"])
        return pgd(*given, momentum=0.5, **told)

    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    register_attack(entry("mm_cb.attacks.objectives.target:target_objective", name="own", optimizer=halved))
    attack("miniature", first_behaviors(tmp_path, 1), tmp_path / "run", attacks="own", steps=2, max_new_tokens=2)
    assert seen == [2]
    with pytest.raises(UserError, match="`--optimizer` is for an attack by PGD that brings none"):
        refuse_idle(AttackConfig("own", optimizer="sign"), ["own"])


def test_an_objective_whose_files_have_another_loss_fails_the_check(tmp_path, monkeypatch):
    class Elsewhere(TargetObjective):
        def __init__(self, subject, behaviors, pictures, **settings):
            super().__init__(subject, behaviors, pictures)

        def loss(self, pixel_values):
            return super().loss(pixel_values) + 1

    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    register_attack(entry(Elsewhere, name="own"))
    run = attack("miniature", first_behaviors(tmp_path, 1), tmp_path / "run", attacks="own", steps=1, max_new_tokens=2)
    failed = [c["name"] for c in json.loads((run.folder / "checks.json").read_text()) if not c["passed"]]
    assert failed == ["loss of the saved file equals the logged loss"]


def test_an_objective_of_hidden_states_is_made_as_the_page_says(made, tmp_path, monkeypatch):
    made_of = re.search(r"  ```\n(.*?)  ```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    inputs, preprocess, _, output = (line.split("  #")[0].strip() for line in made_of.splitlines())

    class AwayFromClean:
        """The last token's state away from where the clean picture puts it."""

        def __init__(self, subject, behaviors, pictures, **settings):
            space = {"subject": subject, "behaviors": behaviors, "pictures": pictures}
            exec(f"{inputs}\n{preprocess}", {"encode": encode, "preprocessing": preprocessing}, space)
            self.subject, self.inputs, self.preprocess = subject, space["inputs"], space["preprocess"]
            self.clean = self.state(output, lambda pixels: self.inputs.pixel_values).detach()

        def state(self, forward, preprocess, pixels=None):
            with self.subject.active() as model:
                space = {"model": model, "inputs": self.inputs, "preprocess": preprocess, "pixels": pixels}
                exec(forward, {}, space)
            return space["output"].hidden_states[4][:, -1].float()

        def __call__(self, pixels):
            return torch.cosine_similarity(self.state(output, self.preprocess, pixels), self.clean, dim=-1)

        def loss(self, pixel_values):
            return torch.cosine_similarity(self.state(output, lambda pixels: pixel_values), self.clean, dim=-1)

    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    register_attack(AttackEntry("away", "away from the clean state", "away PGD", "pgd", AwayFromClean))
    first_behaviors(tmp_path, 2)
    attack("miniature", tmp_path / "behaviors.jsonl", tmp_path / "run", attacks="away", steps=3, max_new_tokens=4)
    assert all(check["passed"] for check in json.loads((tmp_path / "run" / "checks.json").read_text()))
    assert not any(row.disagreements for row in verify_run(str(tmp_path / "run")))


def test_the_command_line_takes_a_file_that_registers_an_attack(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    second = """
from PIL import Image
flat = lambda behavior, size: Image.new("RGB", size[::-1], (90, 120, 40))
register_attack(AttackEntry("flat", "one colour", "flat", "draw", draw=flat))
"""
    (tmp_path / "mine.py").write_text(code[: code.index("run = attack(")] + second)
    first_behaviors(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    words = ["attack", "--model", "miniature", "--behaviors", "behaviors.jsonl", "--out", "run", "--steps", "2"]
    assert cli.run([*words, "--attack", "noise,mine.py", "--max-new-tokens", "4"]) == 0
    assert {item["condition"] for item in read_jsonl(tmp_path / "run" / "items.jsonl")} == {
        *("noise", "no_refusal", "flat")
    }
    assert "mm-cb attack verify run --attack mine.py" in " ".join(capsys.readouterr().out.split())
    own = ("no_refusal", "flat")
    monkeypatch.setattr(registry, "_ATTACKS", {k: v for k, v in registry._ATTACKS.items() if k not in own})
    assert cli.run(["attack", "verify", "run"]) == 2
    assert "named by its file, with `--attack FILE.py`" in capsys.readouterr().err
    assert cli.run(["attack", "verify", "run", "--attack", "mine.py"]) == 0
    assert cli.run(["attack", "verify", "run", "--attack", "other.py"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_file_that_a_run_names_as_an_attack_is_not_run(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "theirs"
    shutil.copytree(made[0], folder)
    (tmp_path / "no_refusal.py").write_text("open('was-run', 'w')")
    restated(folder, lambda run: run["recipe"].update(attack="noise,no_refusal.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.run(["attack", "verify", str(folder)]) == 2
    assert "unknown attack `no_refusal.py`" in capsys.readouterr().err
    assert not Path("was-run").exists()
