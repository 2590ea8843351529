"""What commands say: nothing is broken that one would copy, and what is printed as a command is one."""

import shlex
from pathlib import Path

import pytest

from mm_cb.core.closing import Hint, base_folder, command, cut, here, say, shell, typed, what_next


@pytest.fixture(autouse=True)
def eighty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


WORDS = [
    ["attack", "--model", "miniature", "--adapter", "runs/a b", "--behaviors", "it's.jsonl", "--out", "runs/x" * 6],
    ["report", *(f"runs/number-{i}" for i in range(12)), "--out", "$HOME;report.html"],
]


@pytest.mark.parametrize("words", WORDS, ids=["flags", "many"])
def test_a_command_over_several_lines_is_the_same_command(words):
    printed = command(words)
    assert max(map(len, printed.splitlines())) <= 80 < len(printed)
    assert shlex.split(printed.replace("\\\n", "")) == ["mm-cb", *words]
    assert all(line.endswith(" \\") for line in printed.splitlines()[:-1])


def test_a_comment_stays_one():
    assert all(line.startswith("  # ") for line in shell("# " + "word " * 40).splitlines())


def test_paths_are_told_from_here_where_they_lie_below(tmp_path):
    assert here(tmp_path / "runs" / "a") == here("runs/a") == "runs/a"
    assert here("/elsewhere/a") == "/elsewhere/a" and here("../a") == "../a"


@pytest.mark.parametrize("name", ["-x", "--out", "-x y", "-", "--", "-x=1"])
def test_a_folder_that_looks_like_a_flag_is_printed_as_a_path(name, tmp_path):
    (tmp_path / name).mkdir()
    for path in (Path(name), tmp_path / name, Path("a") / ".." / name):
        printed = shlex.split(command(["report", path, Path(base_folder(path))]))[2:]
        assert [Path(word) for word in printed] == [Path(name), Path(f"{name}-base")]
        assert all(word.startswith("./") for word in (*printed, *shlex.split(typed(path))))


def test_paths_are_as_given_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert here(tmp_path / "a") == str(tmp_path / "a") and here("runs/a") == "runs/a"
    assert str(tmp_path / "a") in command(["report", tmp_path / "a"])


@pytest.mark.parametrize("name", ["", "short", "x" * 24, "a-long-prefix-shared-by-all-0001", "é" * 100])
def test_what_is_cut_keeps_both_ends(name):
    found = cut(name, 24)
    assert len(found) == min(len(name), 24) and name.startswith(found[:11]) and name.endswith(found[-11:])


def test_prose_breaks_between_words_and_takes_no_orders(capsys):
    path = "a-path/" * 20
    say(f"\x1b[2J see {path} and " + "more-than-this " * 8, "  ")
    what_next(Hint("why\x07", ["report", Path("runs/a")]), None)
    out = capsys.readouterr().out
    assert path in out and "\x1b" not in out and "\x07" not in out and "  mm-cb report runs/a\n" in out
    assert all(len(line) <= 80 for line in out.splitlines() if path not in line) and "this\n" in out
