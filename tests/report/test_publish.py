import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mm_cb.metrics.results import Measurement, find, read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def publish(monkeypatch):
    spec = importlib.util.spec_from_file_location("publish_miniature", ROOT / "scripts" / "publish_miniature.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_goal_has_a_row_and_a_missed_one_says_so(publish, make_run, tmp_path, monkeypatch):
    run = make_run(n=24)
    content = json.loads((run / "run.json").read_text())
    content["recipe"] = {**content.get("recipe", {}), "full": True, "rr_seeds": 3}
    (run / "run.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["publish", str(run), "--out", str(tmp_path / "results")])
    publish.main()
    text = (tmp_path / "results" / "miniature.md").read_text()
    assert f"Revision {'0' * 40}, torch 2.13.0, 2 cores, 2030-01-01." in text
    measured = read_results(run / "results.json")
    for what, subject, metric, condition, split, field, low, high in publish.GOALS:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
        found = find(measured, subject, metric, condition, split)
        value = None if found is None else getattr(found, field)
        first = row.split(" | ")[3]
        assert ("not measured" in first) is (value is None)
        assert ("**missed**" in first) is (value is not None and not low <= value <= high)
    assert (tmp_path / "results" / "miniature.png").stat().st_size > 1000


@pytest.mark.parametrize("ended", [None, ""])
def test_an_unfinished_run_is_not_published(publish, make_run, tmp_path, monkeypatch, ended):
    run = make_run(n=24)
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(content | {"ended": ended}))
    monkeypatch.setattr(sys, "argv", ["publish", str(run), "--out", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match="must be a finished `mm-cb demo`"):
        publish.main()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("value", "missed"), [(5.0, False), (5.1, True)])
def test_a_goal_is_met_up_to_its_bound(publish, value, missed):
    measured = Measurement("rr", "compliance", "pgd", "trained_kinds", value, 84, (0.0, 9.0))
    assert ("**missed**" in publish._cell(measured, value, "value", 0, 5)) is missed
