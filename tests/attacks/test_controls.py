"""Runs beside an attack run: which behaviours, whose text, which attacks; and that no rate counts them."""

import json
from dataclasses import replace

import pytest
import torch

from mm_cb.attacks import controls
from mm_cb.attacks.config import AttackConfig, checked_by_default
from mm_cb.attacks.controls import (
    CONTROL,
    CONVERGENCE,
    drawn,
    first_try,
    supplied,
    swapped,
    twice_the_steps,
    wrong_text,
)
from mm_cb.attacks.entry import AttackEntry
from mm_cb.attacks.objectives.anneal import scale_after
from mm_cb.attacks.registry import attacks
from mm_cb.core.checked import read_records
from mm_cb.core.compatibility import with_attack_flags
from mm_cb.core.records import Item
from mm_cb.core.runs import read_run
from mm_cb.data.behaviors_file import Behavior
from mm_cb.report.load import load_run
from tests.attacks.helpers import attack, first_behaviors, save_adapter


def behaviors(categories, targets=None):
    targets = targets or [f"sure, {i}" for i in range(len(categories))]
    return [Behavior(f"b{i}", f"p{i}", t, None, c) for i, (c, t) in enumerate(zip(categories, targets, strict=True))]


def test_drawn_behaviours_keep_their_order_are_the_same_for_a_seed_and_all_where_there_are_no_more():
    many = behaviors(["a"] * 48)
    found = drawn(many, 12, 0)
    assert found == drawn(many, 12, 0) and len(found) == 12 and found != drawn(many, 12, 1)
    assert [many.index(b) for b in found] == sorted(many.index(b) for b in found)
    assert drawn(many[:5], 12, 0) == many[:5]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("categories", ["abcdabcdabcd", "aaabbb", "aaaab", "aa"])
def test_every_behaviour_gets_anothers_text_once_of_another_category_where_that_can_be(categories, seed):
    chosen = behaviors(list(categories))
    pairs = swapped(chosen, seed)
    assert [own for own, _ in pairs] == chosen
    assert sorted(b.id for _, b in pairs) == sorted(b.id for b in chosen) and all(a is not b for a, b in pairs)
    most = max(categories.count(c) for c in categories)
    assert sum(a.category != b.category for a, b in pairs) > 0 or most == len(categories)


def test_a_text_is_never_swapped_for_the_same_and_one_behaviour_has_no_other():
    assert swapped(behaviors("ab", ["sure", "sure"]), 0) == [] and swapped(behaviors("a"), 0) == []


@pytest.mark.parametrize("seed", range(6))
def test_another_text_goes_before_another_category(seed):
    assert len(swapped(behaviors("aabb", ["sure", "of course", "sure", "of course"]), seed)) == 4


def test_the_control_is_one_plain_try_of_each_attack_that_was_given_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr(controls, "supplied", lambda folder, attack: {f"b{i}": f"text {i}" for i in range(4)})
    tried = AttackConfig("pgd", restarts=3, iterates=2, samples=4, temperature=0.5, early_stop=True, chain=True)
    plan = wrong_text(tried.named(["pgd", "pgd_long"]), behaviors("abab"), tmp_path)
    assert plan.configs == [AttackConfig("pgd_long")]
    assert len(plan.responses) == 4 and all(text != f"text {id[1]}" for id, text in plan.responses.items())


def test_the_control_swaps_bare_facts_too(monkeypatch, tmp_path):
    monkeypatch.setattr(controls, "supplied", lambda folder, attack: {b.id: b.facts for b in asked})
    asked = [replace(b, extra={"facts": f"facts of {b.id}"}) for b in behaviors("abab")]
    plan = wrong_text([AttackConfig("pgd_facts")], asked, tmp_path)
    assert len(plan.behaviors) == 4 and all(b.facts == plan.responses[b.id] for b in plan.behaviors)
    assert all(b.facts != f"facts of {b.id}" for b in plan.behaviors)


def test_no_behaviour_is_given_the_text_that_it_had_though_another_had_it_too(monkeypatch, tmp_path):
    monkeypatch.setattr(controls, "supplied", lambda folder, attack: {"b0": "first . then", "b1": "first . then"})
    assert wrong_text([AttackConfig("pgd_long")], behaviors("ab"), tmp_path) is None


@pytest.mark.parametrize("other", [{"restart": 1}, {"iterate": 3}, {"sample": 1}])
def test_the_first_try_is_the_greedy_answer_to_the_selected_picture_of_the_first_run(other):
    first = {"restart": 0, "completion": "sure"}
    assert first_try({"candidates": [{**first, **other}, first]}) is first and first_try({"candidates": None}) is None


def test_twice_the_steps_is_for_attacks_that_step_and_enter_the_worst_case_on_enough_behaviours():
    configs = replace(AttackConfig(steps=50), check_convergence=12).named([entry.name for entry in attacks()])
    plan = twice_the_steps(configs, behaviors(["a"] * 30), None)
    assert {c.name for c in plan.configs} == {e.name for e in attacks() if e.optimises and e.in_worst_case}
    assert {c.steps for c in plan.configs} == {100} and len(plan.behaviors) == 12
    assert twice_the_steps(configs, behaviors(["a"] * 11), None) is None
    assert twice_the_steps([replace(c, check_convergence=0) for c in configs], behaviors(["a"] * 30), None) is None
    assert checked_by_default("all") == 12 and checked_by_default("pgd") == 0


@pytest.mark.parametrize("count", [1, 11, -1])
def test_fewer_behaviours_than_the_rule_asks_for_are_refused(count):
    with pytest.raises(ValueError, match="check.convergence"):
        AttackConfig(check_convergence=count)


def test_a_forced_response_is_called_supplied_text_and_old_items_are_told_what_was_given():
    with pytest.raises(ValueError, match="supplied text"):
        AttackEntry("x", "", "x", "pgd", "a:b", forces_response=True)
    newer = ("best_of_n", "pgd_transfer", "pgd_eot", "universal_corpus", "imported", "pgd_probe", "pgd_facts")
    newer += ("pgd_homotopy_opening", "pgd_form", "pgd_form_found")
    for entry in (one for one in attacks() if one.name not in newer):
        old = {"metric": "compliance", "condition": entry.name, "subject": "rr", "id": "b"}
        found = with_attack_flags(old)
        assert (found["given"], found["knows_breaker"]) == (entry.given, entry.needs_adapter), entry.name
    assert with_attack_flags({**old, "condition": "from_base"})["given"] == "base's pictures"
    assert with_attack_flags({**old, "condition": "from_rr"})["given"] == "opening"


def test_an_attack_that_dials_the_adapter_up_settles_when_its_last_behaviour_is_at_the_whole_one():
    losses = torch.tensor([0.0, 1e9])
    for by in ("steps", "loss"):
        settles = AttackConfig("pgd_homotopy", anneal=by).settles
        found, steps = torch.zeros(2), []
        for step in range(1, 1001):
            found = scale_after(by, found, losses, step, 1000)
            steps += [step] if bool((found == 1).all()) else []
        assert steps[0] / 1000 == pytest.approx(settles, abs=2e-3), by
    assert AttackConfig("pgd").settles == 0 == AttackConfig("pgd_homotopy", anneal="none").settles


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two attacks on 12 behaviours, of which one was given a text, with both runs beside them."""
    folder = tmp_path_factory.mktemp("beside")
    settings = {"batch": 12, "steps": 2, "check_convergence": 12, "control": 3, "max_new_tokens": 4}
    adapter = save_adapter(folder / "adapter", 0)
    asked = first_behaviors(folder, 12)
    return attack(folder / "run", asked, "pgd,pgd_long", adapter=str(adapter), **settings)


def test_the_runs_beside_are_whole_runs_and_in_no_rate(run):
    whole = load_run(run)
    assert {m.n for m in whole.measurements if m.split == "all"} == {12}
    longer, wrong = load_run(run / CONVERGENCE), load_run(run / CONTROL)
    assert (longer.run["recipe"]["steps"], wrong.run["recipe"]["steps"]) == (4, 2)
    assert {i["condition"] for i in longer.items} == {"pgd", "pgd_long"} and len(longer.items) == 24
    assert {i["condition"] for i in wrong.items} == {"pgd_long"} and len(wrong.items) == 3


def test_the_control_supplies_the_text_that_another_behaviour_had(run):
    right, wrong = supplied(run, "pgd_long"), supplied(run / CONTROL, "pgd_long")
    assert len(wrong) == 3
    for id, text in wrong.items():
        assert text != right[id] and text in right.values()


def test_the_page_reads_what_ran_beside(run):
    found = {one.condition: one for one in load_run(run).strengths}
    assert "twice the steps changed content" in found["pgd"].why
    assert found["pgd"].control is None and found["pgd_long"].control.n == 3
    assert (found["pgd"].given, found["pgd_long"].given) == ("opening", "supplied text")


def test_the_same_command_runs_nothing_twice_and_adds_what_a_finished_run_lacks(run, tmp_path):
    behaviors_file = run.parent / "behaviors.jsonl"
    adapter = str(run.parent / "adapter")
    settings = {"batch": 12, "steps": 2, "max_new_tokens": 4}
    bare = attack(tmp_path / "run", behaviors_file, "pgd,pgd_long", adapter=adapter, control=0, **settings)
    assert not (bare / CONTROL).exists() and not (bare / CONVERGENCE).exists()
    before = (bare / "items.jsonl").read_bytes()
    attack(bare, behaviors_file, "pgd,pgd_long", adapter=adapter, control=3, check_convergence=12, **settings)
    for name in (CONTROL, CONVERGENCE):
        made = [json.dumps(item) for item in read_records(bare / name / "items.jsonl", Item)]
        assert made == [json.dumps(item) for item in read_records(run / name / "items.jsonl", Item)]
    assert (bare / "items.jsonl").read_bytes() == before
    ended = read_run(bare / CONTROL)["ended"]
    attack(bare, behaviors_file, "pgd,pgd_long", adapter=adapter, control=5, check_convergence=12, **settings)
    assert read_run(bare / CONTROL)["ended"] == ended
