"""The comparison of optimizers on a stand-in model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mm_cb.evaluation.subjects import Subject
from tests.tiny_llava import picture, tiny_llava

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("compare_optimizers", ROOT / "scripts" / "compare_optimizers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_optimizers"] = module
    spec.loader.exec_module(module)
    return module


def test_every_optimizer_gets_the_same_start_and_a_row_is_appended(script, monkeypatch, tmp_path, capsys):
    lines = []
    for i, prompt in enumerate(["what is in the picture", "tell me how to brew tea", "what is red"]):
        picture(i, (84, 42) if i < 2 else (42, 84)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"id": str(i), "prompt": prompt, "target": "a red circle", "image": f"{i}.png"}))
    (tmp_path / "behaviors.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(script, "load_subject", lambda source, name: Subject(name, tiny_llava()))
    arguments = ["--behaviors", str(tmp_path / "behaviors.jsonl"), "--steps", "4", "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["compare_optimizers.py", *arguments])
    script.main()
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["n"] == 2 and row["subject"] == "base"  # the third picture has another size
    assert row["command"] == (
        "python scripts/compare_optimizers.py --behaviors behaviors.jsonl --steps 4 --out out.jsonl"
    )
    found = [row[name] for name in script.OPTIMIZERS]
    assert len({each["mean_after_share_of_steps"]["0"] for each in found}) == 1
    assert all(each["mean"] < each["mean_after_share_of_steps"]["0"] for each in found)
    assert len({each["mean"] for each in found}) > 1


def test_the_recorded_command_has_every_setting_and_no_folder(script, tmp_path):
    (tmp_path / "an adapter").mkdir()
    settings = ["--model", "org/name", "--loss", "matching", "--epsilon", "8", "--count", "3", "--steps=9"]
    paths = ["--behaviors", str(tmp_path / "v.jsonl"), f"--adapter={tmp_path / 'an adapter'}", "--out", "out/o.jsonl"]
    assert script.command([*settings, *paths], "out/o.jsonl") == (
        "python scripts/compare_optimizers.py --model org/name --loss matching --epsilon 8 --count 3 --steps=9 "
        "--behaviors v.jsonl '--adapter=an adapter' --out o.jsonl"
    )
