"""What is printed may find no reader and no room: the exit code says so, and nothing else changes."""

import os
import signal
import sys
import warnings

import pytest

from mm_cb import cli
from mm_cb.cli import output, signals

COMMANDS = (["--version"], ["--help"], ["train", "--list"], ["eval", "--list"], ["data", "list"], ["doctor"])


@pytest.fixture
def main(monkeypatch):
    """The exit code of a command whose standard output is a file."""
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(output, "_output", [])

    def run(arguments, stream):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["mm-cb", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_room_is_one_line_and_no_reader_is_none(main, capsys, arguments):
    with open("/dev/full", "w", encoding="utf-8") as full:
        assert main(arguments, full) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "standard output could not be written: No space left on device;" in said
    there, here = os.pipe()
    os.close(there)
    with open(here, "w", encoding="utf-8") as unread:
        assert main(arguments, unread) == 0
    assert main(arguments, None) == 0
    assert capsys.readouterr().err == ""


def test_what_has_a_reader_arrives_whole_and_in_its_encoding(main, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_cb.cli.app.run", lambda arguments: 0 * sys.stdout.write("é\u2028 " * 100_000))
    for encoding, character in (("utf-8", "é\u2028 "), ("ascii", "?? ")):
        for at_once in (False, True):  # as with PYTHONUNBUFFERED
            with open(tmp_path / encoding, "w", encoding=encoding) as stream:
                stream.reconfigure(write_through=at_once)
                assert main([], stream) == 0
            assert (tmp_path / encoding).read_text(encoding=encoding) == character * 100_000


def test_a_command_that_fails_keeps_its_own_code(main, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        assert main(["nosuch"], full) == 2
    assert "unknown command" in capsys.readouterr().err
