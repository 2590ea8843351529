"""Everything that comes from the hub, against a hub on this machine: its libraries must be told where it is at start.

So the cases of ``tests/hub_cases.py`` run in a process of their own; by hand the same way, with the command below.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mm_cb.core import hub
from mm_cb.core.errors import UserError

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


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize(
    "name",
    [
        *("export.jsonl", "org/there.csv", "absent.jsonl", "./run", "../rows", "a/b/c", "/nowhere/rows", "runs/r"),
        *("other/", "data\\rows", ".."),
    ],
)
def test_what_is_written_as_a_path_is_no_name_on_the_hub(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export.jsonl").write_text("{}\n")
    (tmp_path / "runs" / "another").mkdir(parents=True)
    (tmp_path / "runs" / "another" / "run.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"must be a folder, (or a name .* it is a file|which is not here)") as error:
        hub.fetch(name, ["*"], kind=kind)
    assert ("it is a file" in str(error.value)) is (name == "export.jsonl")
    assert ("`runs` is here" in str(error.value)) is (name == "runs/r")


@pytest.mark.parametrize("name", ["org/name@refs/pr/1", "org/name@a/branch.json", "org/name"])
def test_a_revision_may_hold_what_a_name_may_not(name, tmp_path, monkeypatch):
    asked = []

    def download(repository, *, revision, **_):
        asked.append(f"{repository}@{revision}".removesuffix("@None"))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "_commits", {})
    assert hub.fetch(name, ["*"]) == tmp_path and asked == [name]


def test_of_a_name_that_no_system_takes_nothing_is_in_the_cache():
    assert hub.cached(f"me/{'a' * 300}", "*") == []
