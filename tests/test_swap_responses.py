import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "swap_responses.py"


@pytest.fixture(scope="module")
def swapped():
    return runpy.run_path(str(SCRIPT))["swapped"]


def test_everybody_keeps_the_opening_and_goes_on_as_the_one_least_alike(swapped):
    pairs = [
        ("sure, here is one:", "Sure , here is one : take moss and salt ."),
        ("sure, here is two:", "sure , here is two : take moss and rust ."),
        ("sure, here is three:", "sure , here is three : take thorn with ink ."),
    ]
    assert swapped(pairs) == [
        "sure, here is one: take thorn with ink .",
        "sure, here is two: take thorn with ink .",
        "sure, here is three: take moss and salt .",
    ]


def item(name, completion, outcome="harmful"):
    return {"id": name, "target": f"here is {name}:", "completion": completion, "outcome": outcome}


def write(folder, items, command="attack"):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema": 1, "command": command, "recipe": {"adapter": None}}))
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    return folder


def start(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_only_harmful_completions_behind_their_target_are_swapped_and_a_run_can_read_them(tmp_path):
    from mm_cb.evaluation.attack_run import hijacked_responses
    from mm_cb.evaluation.behaviors import Behavior

    said = [item("a", "here is a : x y"), item("b", "here is b : v w"), item("c", "no .", "refusal"), item("d", "odd")]
    done = start(write(tmp_path / "run", said), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    asked = [Behavior(name, "p", "t", None) for name in "abc"]
    assert hijacked_responses(str(tmp_path / "out"), asked) == {"a": "here is a: v w", "b": "here is b: x y"}


@pytest.mark.parametrize(("items", "command"), [([item("a", "here is a : x")], "attack"), ([], "demo")])
def test_what_cannot_be_swapped_is_said_in_one_line(tmp_path, items, command):
    done = start(write(tmp_path / "run", items, command), tmp_path / "out")
    assert done.returncode != 0 and done.stderr.startswith("swap_responses: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
