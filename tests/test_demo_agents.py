"""``mm-cb demo --agents`` end to end at the smallest size: from errands and screens to one page."""

import json

import pytest

from mm_cb import demo_agents
from mm_cb.core.checked import read_records
from mm_cb.core.errors import UserError
from mm_cb.core.records import Item


@pytest.fixture
def smallest(monkeypatch):
    load = demo_agents.load_recipe
    few = ["training.max_steps=2", "training.batch_size=2"]
    monkeypatch.setattr(demo_agents, "THREADS", 1)
    monkeypatch.setattr(demo_agents, "QUICK", demo_agents.AgentSize((1, 1, 1), 2, requests=4, calls=8))
    monkeypatch.setattr(demo_agents, "load_recipe", lambda name, changes=(): load(name, [*changes, *few]))


def test_base_prompt_and_breaker_are_asked_attacked_and_shown_on_one_page(smallest, tmp_path, capsys):
    page = demo_agents.run_agents(tmp_path / "out", full=False, seed=0)
    said = capsys.readouterr().out
    text = page.read_text()
    agents = text.partition('<section id="agents">')[2].partition("</section>")[0]
    assert 'class="screen"' in agents and "base + safety prompt" in agents and "forced call" in agents
    assert "[call withheld]" not in agents  # a fiction
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert list(numbers) == ["base", "rr, seed 0"]
    asked = set(demo_agents._NUMBERS) | set(demo_agents._SPLITS)
    knowing = {"hijacked: pgd_adaptive", "hijacked: pgd_clean_teacher", "hijacked: pgd_homotopy"}
    assert set(numbers["rr, seed 0"]) == asked and set(numbers["base"]) == asked - knowing
    assert all(name in said for name in asked)
    items = read_records(tmp_path / "out" / "rr-0" / "rr-screens" / "items.jsonl", Item)
    assert {item["outcome"] for item in items} <= {"harmful", "other", "refusal", "gibberish"}  # by rule, no judge

    before = (tmp_path / "out" / "rr-0" / "rr-screens" / "items.jsonl").stat().st_mtime_ns
    demo_agents.run_agents(tmp_path / "out", full=False, seed=0)
    assert (tmp_path / "out" / "rr-0" / "rr-screens" / "items.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="seed"):
        demo_agents.run_agents(tmp_path / "out", full=False, seed=1)
    assert page.read_text() == text
