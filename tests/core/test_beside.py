"""Work in a second process: its files and words are there at the end, its failures are the caller's."""

import sys
import time

import pytest

from mm_cb.core import beside as module
from mm_cb.core.beside import beside
from mm_cb.core.errors import UserError


def write(path, text):
    sys.stdout.write("written beside\n")
    path.write_text(text)


def fail(kind):
    raise UserError("`--out` is full.") if kind == "user" else RuntimeError("broken")


def wait(path):
    path.write_text("begun")
    time.sleep(60)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 2)


def test_what_it_makes_is_there_at_the_end_and_what_it_says_is_in_the_log(tmp_path, capfd):
    with beside(write, tmp_path / "made", "tea", log=tmp_path / "deep" / "log.txt"):
        pass
    assert (tmp_path / "made").read_text() == "tea" and "written beside" not in capfd.readouterr().out
    assert (tmp_path / "deep" / "log.txt").read_text() == "written beside\n"


def test_its_failure_is_the_callers(tmp_path):
    with pytest.raises(UserError, match="`--out` is full"), beside(fail, "user", log=tmp_path / "log.txt"):
        pass
    with pytest.raises(UserError, match=r"status 1.*log\.txt"), beside(fail, "else", log=tmp_path / "log.txt"):
        pass
    assert "RuntimeError: broken" in (tmp_path / "log.txt").read_text()


def test_it_ends_with_a_block_that_fails(tmp_path):
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), beside(wait, tmp_path / "begun", log=tmp_path / "log.txt"):
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        raise ZeroDivisionError
    assert time.monotonic() - begun < 50


def test_on_one_core_it_comes_first_and_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    with beside(write, tmp_path / "made", "tea", log=tmp_path / "log.txt"):
        assert (tmp_path / "made").read_text() == "tea"
    assert "written beside" in capsys.readouterr().out and not (tmp_path / "log.txt").exists()
