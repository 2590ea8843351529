"""Attacks and benchmarks by the processes of Ray end with the bytes of one process, also when one of them is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.attacks.helpers import attack, first_behaviors

TIMES = ("run.json", "timings.jsonl", ".lock")
"""Files that say when, and on what, a run was made."""


def content(run):
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in TIMES
    }


def started(folder, *arguments, errors=subprocess.STDOUT):
    return subprocess.Popen(
        [sys.executable, "-m", "mm_cb", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_TMPDIR": "/tmp"},
    )


def processes(folder):
    """Those of Ray that work in a folder: their names and numbers."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and (place / "cwd").resolve() == folder.resolve():
                name = (place / "cmdline").read_bytes().partition(b"\0")[0].decode()
                found |= {name.strip(): int(place.name)} if name.startswith("ray::") else {}
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds Ray's processes in /proc")
@pytest.mark.parametrize("leads", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_of_two_processes_of_which_one_is_killed_is_the_run_of_one(tmp_path, leads):
    pytest.importorskip("ray")
    behaviors, out = first_behaviors(tmp_path, 6), tmp_path / "two"
    whole = attack(tmp_path / "one", behaviors, "pgd,apgd", batch=2, chain=True, steps=60, restarts=2)
    arguments = ["attack", "--model", "miniature", "--behaviors", "behaviors.jsonl", "--out", "two", "--ray", "2"]
    arguments += ["--attack", "pgd,apgd", "--batch", "2", "--chain", "--steps", "60", "--restarts", "2"]
    arguments += ["--epsilon", "8/255", "--max-new-tokens", "8", "--control", "0"]
    run = started(tmp_path, *arguments)
    killed = None
    while run.poll() is None and killed is None:
        time.sleep(0.05)
        there = processes(tmp_path)
        if any((out / "parts").glob("*.json")) and len(there) == 2:
            names = [name for name in there if ("lead" in name) is leads]
            killed = there[names[0]] if names else None
    assert killed is not None, run.communicate()[0]
    os.kill(killed, signal.SIGKILL)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert content(out) == content(whole)


@pytest.mark.slow
def test_more_processes_than_there_are_cores_is_one_line(tmp_path):
    pytest.importorskip("ray")
    first_behaviors(tmp_path, 1)
    arguments = ["attack", "--model", "miniature", "--behaviors", "behaviors.jsonl", "--out", "out", "--attack", "pgd"]
    run = started(tmp_path, *arguments, "--ray", "9999", errors=subprocess.PIPE)
    said, told = run.communicate(timeout=300)
    assert run.returncode == 2 and said == ""
    assert told.startswith("mm-cb: `--ray` needs 9999 CPUs, Ray has ") and told.count("\n") == 1
