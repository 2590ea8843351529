"""The whole experiment, end to end, at the smallest size: the same code as ``mm-cb demo``."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mm_cb import demo
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from mm_cb.metrics.results import find, read_results

SMALLEST = textwrap.dedent(
    """
    import socket
    import sys
    from pathlib import Path


    def no_network(*_, **__):
        raise OSError("no network")


    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = no_network
    import mm_cb.demo as demo
    demo.THREADS = 1
    demo.QUICK = demo.DemoSize(behaviors=(2, 1, 1), steps=3, restarts=2, multiple_choice=1, open_questions=2,
                           look_alikes=6, representations=6)
    load = demo.load_recipe
    demo.load_recipe = lambda name, changes=(): load(
        name, [*changes, "training.max_steps=4", "training.batch_size=4", "training.save_steps=2"])
    if __name__ == "__main__":
        demo.run_demo(Path(sys.argv[1]), full=False, seed=0, rr_seeds=1)
    """
)
PATCHED = [(demo, name) for name in ("THREADS", "QUICK", "load_recipe")]
PATCHED += [(socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")]
"""What that changes."""
COMPARED = ("items.jsonl", "results.json", "curves.json", "representations.json", "checks.json")


def start(script: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    environment.pop("HF_HUB_OFFLINE", None)  # a user has set nothing; the script itself has no network
    return subprocess.Popen(
        [sys.executable, str(script), str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "smallest.py"
    path.write_text(SMALLEST)
    return path


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start(script, out)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return out, text


@pytest.mark.slow
def test_it_prints_the_table_and_where_the_report_is(finished):
    out, text = finished
    assert "complies" in text and "over-refusal" in text
    assert str(out / "report.html") in text
    command = " ".join(text.replace("\\\n", " ").split())
    assert "--attack pgd_homotopy --steps 1500" in command and f"--adapter {out / 'adapters' / 'rr'}" in command
    # three steps break nothing: no table without its verdict
    assert "No claim: this run shows nothing" in command and "- attack breaks the undefended base: expected" in command
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_results_meet_the_contract(finished):
    out, _ = finished
    content = json.loads((out / "results.json").read_text())
    assert content["schema"] == 1
    keys = {
        "subject",
        "metric",
        "condition",
        "split",
        "value",
        "n",
        "ci95",
        "paired_with",
        "difference",
        "difference_ci95",
    }
    assert all(keys <= m.keys() for m in content["measurements"])
    measured = read_results(out / "results.json")
    for subject in ("base", "base+safety_prompt", "rr"):
        for condition in ("no_attack", "noise", "pgd", "pgd_adaptive", "pgd_facts", "worst_case"):
            found = find(measured, subject, "compliance", condition)
            assert found is not None and found.n == 4, (subject, condition)
            assert (found.paired_with == "base") is (subject != "base")
        for split, n in (("trained_kinds", 3), ("trained", 2), ("held_out_combination", 1), ("held_out_kind", 1)):
            assert find(measured, subject, "compliance", "pgd", split).n == n
        assert find(measured, subject, "mmmu_like", "strict").n == 6
        assert find(measured, subject, "wild_like", "strict").n == 6
        assert find(measured, subject, "over_refusal", "no_attack").n == 6
        assert find(measured, subject, "look_alikes", "strict").n == 6
        assert find(measured, subject, "gibberish", "no_attack").n == 18


@pytest.mark.slow
def test_run_directory_holds_what_the_contract_names(finished):
    out, _ = finished
    run = json.loads((out / "run.json").read_text())
    assert run["command"] == "demo" and run["seed"] == 0 and run["ended"]
    items = read_jsonl(out / "items.jsonl")
    assert len({(i["subject"], i["metric"], i["condition"], i["id"]) for i in items}) == len(items)
    for item in items:
        if item["metric"] == "compliance":
            assert (out / item["image"]).is_file() and (out / item["clean_image"]).is_file()
            assert (out / "attacks" / item["subject"] / "images" / f"{item['id']}.png").is_file()
    assert (out / "adapters" / "rr" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_adaptive_attack_on_the_base_is_pgd_and_says_so(finished):
    items = read_jsonl(finished[0] / "items.jsonl")
    stands_in = [i for i in items if i["condition"] == "pgd_adaptive" and i["subject"] == "base"]
    assert stands_in and all(i["same_as"] == "pgd" for i in stands_in)
    for attack in ("pgd_clean_teacher", "pgd_homotopy"):
        aimed = {i["subject"] for i in items if i["condition"] == attack}
        assert aimed == {"rr"}, "what aims at an adapter needs one"
    assert not any("same_as" in i for i in items if i["subject"] == "rr")


@pytest.mark.slow
def test_started_again_when_finished_repeats_nothing(finished, monkeypatch):
    out, _ = finished
    before = {name: (out / name).read_bytes() for name in COMPARED}
    parts = {p: p.stat().st_mtime_ns for p in out.rglob("parts/*.json")}
    for place, name in PATCHED:
        monkeypatch.setattr(place, name, getattr(place, name))
    exec(SMALLEST, {"__name__": "smallest"})
    demo.run_demo(out, full=False, seed=0, rr_seeds=1)
    assert {name: (out / name).read_bytes() for name in COMPARED} == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("parts/*.json")} == parts


@pytest.mark.slow
@pytest.mark.long  # killed attacks and trainings are tested by themselves
def test_killed_again_and_again_it_ends_with_the_same_bytes(finished, script, tmp_path):
    whole, out = finished[0], tmp_path / "killed"
    marks = [
        "adapters/rr/checkpoints",
        "attacks/base/parts/pgd-s0-r0-0000.json",
        "capability/rr/parts",
    ]
    for mark in marks:
        process = start(script, out)
        deadline = time.monotonic() + 300
        while not (out / mark).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, f"ended before {mark} was there"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "results.json").exists()
    process = start(script, out)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    for name in COMPARED:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for path in whole.rglob("*.png"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_another_runs_directory_is_refused_and_the_difference_named(tmp_path, monkeypatch):
    from mm_cb.core.runs import RunDirectory

    with RunDirectory(tmp_path / "out", "demo", {"full": False, "steps": 7}, 0):
        pass
    with pytest.raises(UserError, match=r"another run.s results, different in: .*recipe\.attack"):
        demo.run_demo(tmp_path / "out", full=False, seed=0, rr_seeds=1)


def test_full_plan_is_as_large_as_the_experiment_asks():
    full = demo.FULL
    assert sum(full.behaviors) >= 100 and full.behaviors[1] + full.behaviors[2] >= 30
    assert full.steps >= 300 and full.restarts >= 3
    assert 6 * full.multiple_choice >= 900 and 3 * full.open_questions >= 300
