"""What an installation from an index has: the wheel, built without a network, opened, and run outside of a checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mm_cb

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import mm_cb, image_attacks
from mm_cb import cli
assert cli.run(["--version"]) == 0 and cli.run(["data", "list"]) == 0
print(mm_cb.__file__, image_attacks.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="what builds the package is not here")
    (path,) = hatchling.WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    return Path(path)


def test_it_has_types_data_and_licences_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mm_cb/py.typed", "image_attacks/py.typed", "mm_cb_main.py"} <= names
    tracked = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    held = set(tracked.splitlines()) or {"data/miniature/behaviors.jsonl", "data/examples/README.md"}
    assert {f"mm_cb/_{name}" for name in held} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"mm_cb", "image_attacks", "mm_cb_main.py", f"mm_cb-{mm_cb.__version__}.dist-info"}
    assert not [name for name in names if {"tests", "conftest.py"} & set(Path(name).parts)]
    assert {"LICENSE", "NOTICE"} == {Path(name).name for name in names if "/licenses/" in name}


def test_it_runs_outside_of_a_checkout_and_names_its_own_data(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "COLUMNS": "1000", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *_, package, attacks = done.stdout.splitlines()
    assert first == f"mm-cb {mm_cb.__version__}"
    assert [Path(one).parents[1] for one in (package, attacks)] == [tmp_path / "installed"] * 2
    data = tmp_path / "installed" / "mm_cb" / "_data"
    shown = " ".join(done.stdout.split())
    assert f"in the package: {data / 'miniature'} " in shown and f" {data / 'examples' / 'README.md'} " in shown
