"""What ``scripts/_env.sh`` does on a fresh clone, with an interpreter that only pretends to install."""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

FAKE = r"""#!/bin/bash
# -c: is it new enough; -m venv DIR: a copy of itself; -m pip install ...: one line in the log; -: the real interpreter
case "$1 $2" in
"-c "*) exit {old} ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") printf '%s\n' "$*" >>"$PIP_LOG"; [ ! -e "$PIP_FAILS" ] ;;
"- "*) exec "{real}" "$@" ;;
*) exit 99 ;;
esac
"""


class Clone:
    """A clone in a folder with a blank in its name, and a search path of our own."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "a clone"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "_env.sh", self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            (self.root / name).write_text(name)
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        for tool in ("bash", "cat", "cp", "dirname", "flock", "mkdir", "rm", "touch"):
            if path := shutil.which(tool):
                (self.bin / tool).symlink_to(path)
        self.log, self.fails = tmp_path / "pip.log", tmp_path / "pip fails"

    def python(self, name="python3", *, old=False):
        path = self.bin / name
        path.write_text(FAKE.format(old=int(old), real=sys.executable))
        path.chmod(0o755)
        return path

    def start(self, level="", **environment):
        ready = 'echo "READY $VENV${PYTHONPATH-}${PYTHONHOME-}"'
        script = f'set -euo pipefail\n. "{self.root}/scripts/_env.sh" {level}\n{ready}'
        variables = {"PATH": str(self.bin), "PIP_LOG": str(self.log), "PIP_FAILS": str(self.fails)} | environment
        return subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, env=variables, timeout=60)

    def installed(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return len(lines)


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def refused(done, message):
    assert done.returncode == 2 and message in done.stderr and "READY" not in done.stdout, done


def test_the_first_start_installs_and_the_second_one_touches_nothing(clone):
    clone.python()
    first = clone.start()
    assert first.returncode == 0 and f"READY {clone.root}/.venv" in first.stdout, first
    assert clone.installed() == 2
    second = clone.start()
    assert second.returncode == 0 and second.stdout == f"READY {clone.root}/.venv\n" and clone.installed() == 0


def test_packages_of_another_installation_are_kept_out(clone):
    clone.python()
    done = clone.start(PYTHONPATH="/elsewhere", PYTHONHOME="/elsewhere")
    assert done.returncode == 0 and "elsewhere" not in done.stdout, done


def test_what_the_tests_need_is_enough_for_the_demo_but_not_the_other_way_round(clone):
    clone.python()
    clone.start()
    clone.installed()
    assert clone.start("dev").returncode == 0 and clone.installed() == 2
    assert clone.start().returncode == 0 and clone.installed() == 0


def test_other_requirements_are_installed_again(clone):
    clone.python()
    clone.start()
    clone.installed()
    (clone.root / "constraints.txt").write_text("another version")
    assert clone.start().returncode == 0 and clone.installed() == 2


def test_another_file_of_versions_is_used_or_refused(clone, tmp_path):
    clone.python()
    clone.start()
    clone.installed()
    floors = tmp_path / "floors.txt"
    refused(clone.start(MM_CB_CONSTRAINTS=str(floors)), "`MM_CB_CONSTRAINTS` must name a file")
    floors.write_text("the oldest")
    done = clone.start(MM_CB_CONSTRAINTS=str(floors))
    assert done.returncode == 0 and f"-c {floors} " in clone.log.read_text(), done
    clone.installed()
    assert clone.start(MM_CB_CONSTRAINTS=str(floors)).returncode == 0 and clone.installed() == 0


def test_an_installation_that_was_cut_off_starts_anew(clone):
    clone.python()
    clone.fails.touch()
    refused(clone.start(), "did not come to its end")
    (clone.root / ".venv" / "half a package").touch()
    clone.fails.unlink()
    assert clone.start().returncode == 0 and clone.installed()
    assert not (clone.root / ".venv" / "half a package").exists()


def test_an_environment_that_somebody_else_made_is_kept(clone, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "bin").mkdir(parents=True)
    shutil.copy(clone.python(), theirs / "bin" / "python")
    (theirs / "their file").touch()
    assert clone.start(MM_CB_VENV=str(theirs)).returncode == 0
    assert (theirs / "their file").exists() and not (clone.root / ".venv").exists()


def test_without_a_new_enough_python_it_says_so(clone):
    clone.python("python3", old=True)
    clone.python("python", old=True)
    refused(clone.start(), "Python 3.11 or newer is needed and none was found")


def test_an_old_python_that_comes_first_is_passed_over(clone):
    clone.python("python3", old=True)
    clone.python("python3.12")
    assert clone.start().returncode == 0


def test_a_named_python_is_used_or_refused_never_replaced(clone):
    clone.python()
    refused(clone.start(PYTHON=str(clone.python("named", old=True))), "`PYTHON` must name a Python 3.11 or newer")
    refused(clone.start(PYTHON="nothing-here"), "nothing-here")


def test_a_folder_that_cannot_be_written_is_one_line(clone, tmp_path):
    clone.python()
    (tmp_path / "file").touch()
    done = clone.start(MM_CB_VENV=str(tmp_path / "file" / "venv"))
    refused(done, "cannot be written; set MM_CB_VENV")
    assert done.stderr.count("\n") == 1


def test_every_job_of_the_actions_file_calls_what_continuous_integration_is_here():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    last = [job["steps"][-1]["run"] for job in jobs.values()]
    assert last and all(line.endswith(".ci/run") for line in last)


def test_every_script_is_valid_shell():
    for script in (*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"):
        assert subprocess.run(["/bin/bash", "-n", str(script)], env=os.environ).returncode == 0, script


class Parsed(Exception):
    """Raised in place of a benchmark's work."""


@pytest.mark.parametrize("name", ["rr", "strength"])
def test_a_benchmark_writes_over_tracked_results_only_when_asked(name, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def stop(parser):
        given = [vars(real(parser, words)) for words in ([], ["--write"])]
        raise Parsed([next((v for k, v in one.items() if k in ("json", "out")), "absent") for one in given])

    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    main = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / f"{name}.py"), run_name="read")["main"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as found:
        main()
    unasked, asked = found.value.args[0]
    assert unasked is None and asked.parent == ROOT / "results" and asked.is_file()
