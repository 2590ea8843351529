"""docs/add_an_attack.md: its example runs, and what it leaves is a run like any other."""

import json
import re
from pathlib import Path

import pytest

from mm_cb import cli
from mm_cb.attacks import registry
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.registry import AttackEntry, register_attack
from mm_cb.attacks.run import attack
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from tests.attacks.helpers import edited, first_behaviors

PAGE = Path(__file__).parents[2] / "docs" / "add_an_attack.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page's example, run with three steps; the table is put back, as another process would have it."""
    folder = tmp_path_factory.mktemp("own")
    first_behaviors(folder, 2)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert "steps=100" in code
    (folder / "own.py").write_text(code.replace("steps=100", "steps=3, max_new_tokens=4"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
        space = {}
        exec(compile(code.replace("steps=100", "steps=3, max_new_tokens=4"), "own.py", "exec"), space)
        rows = verify_run(folder / "runs/mine")
    return folder / "runs/mine", space, rows


def test_the_example_is_searched_saved_checked_and_verified(made):
    folder, space, rows = made
    assert len(rows) == 4 and not any(row.disagreements for row in rows)
    assert {m.condition for m in space["run"].measurements} >= {"noise", "no_refusal", "worst_case"}
    assert all(check["passed"] for check in json.loads((folder / "checks.json").read_text()))
    for item in (i for i in read_jsonl(folder / "items.jsonl") if i["condition"] == "no_refusal"):
        (one,) = item["candidates"]
        assert one["objective_file"] == pytest.approx(one["objective_logged"], abs=1e-4)
        assert one["objective_file"] < item["loss"] < item["loss_clean"]  # the refusal is subtracted; it fell
    assert json.loads((folder / "protocol.json").read_text())["labels"]["no_refusal"] == "no-refusal PGD"


def test_another_process_reports_it_and_says_that_it_cannot_verify_it(made, tmp_path, capsys):
    folder, _, _ = made
    assert "no_refusal" not in registry.attack_names()
    assert cli.run(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "no-refusal PGD" in page and "worst of all attacks" in page
    capsys.readouterr()
    assert cli.run(["attack", "verify", str(folder)]) == 2
    assert "unknown attack `no_refusal`" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [(True, 100.0), (False, 0.0)])
def test_its_own_flag_says_whether_it_counts_in_the_worst_case(flag, value):
    from mm_cb.metrics.results import find, measure

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
    honest = path.read_bytes(), (folder / "items.jsonl").read_bytes()
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
    with pytest.raises(UserError, match="objective_file .* recorded"):
        verify_run(folder)
    path.write_bytes(honest[0])
    (folder / "items.jsonl").write_bytes(honest[1])


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
    assert registry.chosen_attacks("own", adapted=False) == ["own"] and "own" in registry.attack_names()


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
