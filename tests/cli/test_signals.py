"""Commands that a scheduler ends: state kept, one line, 128 and the signal's number.

Attacks, and the other signals: tests/cli/test_faults.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mm_cb import cli
from mm_cb.core.runs import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def begun(arguments, folder):
    """A command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mm_cb", *arguments]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=_hears_all, **pipes)


def _hears_all():
    """These tests may themselves run under nohup, which children inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ended(process, number, when, seconds=60):
    """Its exit code and what it said, once ``when`` was true and the signal had been sent."""
    deadline = time.monotonic() + seconds
    try:
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        return process.wait(seconds), process.stderr.read().decode()
    finally:
        process.kill()


TRAIN = ["train", "miniature", "--out", "rr", "training.max_steps=400", "training.save_steps=2"]
TRAIN += ["training.batch_size=2", "circuit_breaker.adversary.steps=0"]


def test_a_training_run_that_is_ended_keeps_its_state_and_says_how_to_go_on(tmp_path):
    process = begun(TRAIN, tmp_path)
    code, said = ended(process, signal.SIGTERM, lambda: len(read_jsonl(tmp_path / "rr" / "metrics.jsonl")) >= 3)
    assert code == 143 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last == f"mm-cb: ended by SIGTERM; run the same command again to go on: mm-cb {' '.join(TRAIN)}"
    assert list((tmp_path / "rr" / "checkpoints").glob("checkpoint-*"))


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
