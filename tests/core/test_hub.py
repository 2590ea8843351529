"""Everything that comes from the hub, against a hub on this machine: its libraries must be told where it is at start.

So the cases of ``tests/hub_cases.py`` run in a process of their own; by hand the same way, with the command below.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_cases_against_a_hub_on_this_machine(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    mine |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"), "MM_CB_FAKE_HUB": port}
    mine |= {"NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(ROOT / "tests" / "hub_cases.py"), "--basetemp", str(tmp_path / "cases")]
    done = subprocess.run(command, cwd=ROOT, env=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
