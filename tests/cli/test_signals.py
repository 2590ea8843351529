"""Commands that a scheduler ends: state kept, one line, 128 and the signal's number.

Attacks, and the other signals: tests/cli/test_faults.py.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm_cb import cli
from mm_cb.core.runs import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def begun(arguments, folder):
    """A command in a process of its own, forked off so that it need not import torch again; it speaks into a file."""

    def command():
        for number in (signal.SIGHUP, signal.SIGTERM):  # these tests may run under nohup, or behind a command's own
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        sys.argv = ["mm-cb", *arguments]
        with open("said", "w", buffering=1) as sys.stderr, open(os.devnull, "w") as sys.stdout:
            cli.main()

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    return process


def ended(process, number, when, said, seconds=60):
    """Its exit code and what it said, once ``when`` was true and the signal had been sent."""
    deadline = time.monotonic() + seconds
    try:
        while not when() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.is_alive(), said.read_text()
        os.kill(process.pid, number)
        process.join(seconds)
        return process.exitcode, said.read_text()
    finally:
        process.kill()


TRAIN = ["train", "miniature", "--out", "rr", "training.max_steps=400", "training.save_steps=2"]
TRAIN += ["training.batch_size=2", "circuit_breaker.adversary.steps=0"]


def test_a_training_run_that_is_ended_keeps_its_state_and_says_how_to_go_on(tmp_path):
    process = begun(TRAIN, tmp_path)
    metrics = tmp_path / "rr" / "metrics.jsonl"
    code, said = ended(process, signal.SIGTERM, lambda: len(read_jsonl(metrics)) >= 3, tmp_path / "said")
    assert code == 143 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last == f"mm-cb: ended by SIGTERM; run the same command again to go on: mm-cb {' '.join(TRAIN)}"
    assert list((tmp_path / "rr" / "checkpoints").glob("checkpoint-*"))


SENDS = """
import os, signal, sys
class Sends:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Sends())
for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["mm-cb", "doctor", "--recipe", "miniature"]
from mm_cb_main import main
main()
"""


@pytest.mark.parametrize("module", ["mm_cb", "mm_cb.core.reading", "typer", "mm_cb.cli.app", "mm_cb.training", "torch"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_is_being_imported_an_ending_is_one_line(module, number):
    code = SENDS.format(module=module, number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + number and not done.stdout
    assert re.fullmatch(rf"mm-cb: (interrupted|ended by {number.name})[ ;][^\n]*\n", done.stderr), done.stderr


def test_what_fails_over_an_interrupt_is_an_interrupt(monkeypatch, capsys):
    def run_demo(out, **options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("a module is half imported")  # noqa: B904

    monkeypatch.setattr("mm_cb.demo.run_demo", run_demo)
    assert cli.run(["demo"]) == 130
    assert "Traceback" not in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_nohup_is_respected():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from mm_cb.cli import signals"
    code += "; signals.listen(); import os; os.kill(os.getpid(), signal.SIGHUP); print('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "on\n"


def test_a_failure_behind_the_signal_is_still_the_signals(monkeypatch, capsys):
    def run_demo(out, **options):
        raise OSError("the terminal is gone")

    monkeypatch.setattr("mm_cb.demo.run_demo", run_demo)
    monkeypatch.setattr("mm_cb.cli.signals._received", [signal.SIGTERM])
    assert cli.run(["demo"]) == 143
    assert "Traceback" not in capsys.readouterr().err
