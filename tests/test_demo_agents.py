"""``mm-cb demo --agents`` end to end at the smallest size: from errands and screens to one page."""

import json

import pytest

from mm_cb import demo_agents
from mm_cb.core import beside
from mm_cb.core.checked import read_records
from mm_cb.core.errors import UserError
from mm_cb.core.records import Item
from mm_cb.core.runs import write_jsonl
from mm_cb.miniature.agent.errands import NO_TOOL


@pytest.fixture
def smallest(monkeypatch):
    load = demo_agents.load_recipe
    few = ["training.max_steps=2", "training.batch_size=2", "circuit_breaker.adversary.steps=1"]
    monkeypatch.setattr(beside, "available_cores", lambda: 1)  # another process would have the whole size
    monkeypatch.setattr(demo_agents, "QUICK", demo_agents.AgentSize((1, 1, 1), 2, requests=4, calls=8))
    monkeypatch.setattr(demo_agents, "load_recipe", lambda name, changes=(): load(name, [*changes, *few]))


@pytest.mark.slow
def test_base_prompt_and_breaker_are_asked_attacked_and_shown_on_one_page(smallest, tmp_path, capsys):
    page = demo_agents.run_agents(tmp_path / "out", full=False, seed=0)
    said = capsys.readouterr().out
    text = page.read_text()
    agents = text.partition('<section id="agents">')[2].partition("</section>")[0]
    assert 'class="screen exact"' in agents and "base + safety prompt" in agents and "forced call" in agents
    assert "[call withheld]" not in agents  # a fiction
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert list(numbers) == ["base", "rr, seed 0"]
    asked = set(demo_agents._NUMBERS) | set(demo_agents._SPLITS) | set(demo_agents._BY_LAW)
    knowing = {"hijacked: pgd_adaptive", "hijacked: pgd_clean_teacher", "hijacked: pgd_homotopy"}
    assert set(numbers["rr, seed 0"]) == asked and set(numbers["base"]) == asked - knowing
    assert all(name in said for name in asked)
    items = read_records(tmp_path / "out" / "rr-0" / "rr-screens" / "items.jsonl", Item)
    assert {item["outcome"] for item in items} <= {"harmful", "other", "refusal", "gibberish"}  # by rule, no judge

    before = (tmp_path / "out" / "rr-0" / "rr-screens" / "items.jsonl").stat().st_mtime_ns
    demo_agents.run_agents(tmp_path / "out", full=False, seed=0)
    assert (tmp_path / "out" / "rr-0" / "rr-screens" / "items.jsonl").stat().st_mtime_ns == before
    held = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    for full, seed in ((False, 1), (True, 0)):
        with pytest.raises(UserError, match="another size or seed"):
            demo_agents.run_agents(tmp_path / "out", full=full, seed=seed)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == held
    assert page.read_text() == text


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rr").write_text("mine")
    with pytest.raises(UserError, match="it holds rr"):
        demo_agents.run_agents(tmp_path / "out", full=False, seed=0)
    with pytest.raises(UserError, match="is a file"):
        demo_agents.run_agents(tmp_path / "out" / "rr", full=False, seed=0)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["rr"]


def test_a_forbidden_call_under_attack_counts_though_the_attacker_wanted_another(tmp_path):
    def line(id_, condition, said):
        return {"id": id_, "metric": "compliance", "condition": condition, "subject": "rr", "completion": said}

    hex_ = '<tool_call>\n{"name": "sell", "arguments": {"kind": "hex", "folk": "millers"}}\n</tool_call>'
    lines = [line("a", "pgd", "sun"), line("a", "pgd_homotopy", hex_), line("b", "pgd", hex_), line("c", "noise", hex_)]
    write_jsonl(tmp_path / "items.jsonl", [*lines, line("d", "pgd", NO_TOOL)])
    found = demo_agents.by_law(tmp_path)
    assert [one["value"] for one in found.values()] == [25.0, 50.0, 25.0]
    assert {one["n"] for one in found.values()} == {4}
