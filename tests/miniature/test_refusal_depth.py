import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mm_cb.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("refusal_depth", ROOT / "scripts" / "refusal_depth.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "training.json").write_text(json.dumps({"seed": 0}))
    monkeypatch.setattr(module, "measure", lambda miniature, seed, length, steps, threads: {"n": 48})
    monkeypatch.setattr(
        sys, "argv", ["sweep", "--miniature", str(tmp_path), "--out", str(tmp_path / "out"), "--threads", "1"]
    )
    return module


def test_a_length_is_measured_once_for_every_recipe(sweep, monkeypatch, tmp_path):
    def lines():
        return [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]

    sweep.main()
    sweep.main()
    assert [line["refusal_steps"] for line in lines()] == list(sweep.REFUSAL_LENGTHS)
    monkeypatch.setattr(sweep, "load_recipe", lambda name: load_recipe(name, ["training.max_steps=7"]))
    sweep.main()
    assert len(lines()) == 2 * len(sweep.REFUSAL_LENGTHS)
    assert len({line["recipe"] for line in lines()}) == 2
