import io
import re
from collections import Counter

import pytest
from rich.table import Table

from mm_cb.core import progress
from mm_cb.core.progress import Progress, clock, console, print_whole
from mm_cb.core.terminal import printable


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_lines_are_few_and_tell_the_time_left(monkeypatch):
    time, file = Clock(monkeypatch), io.StringIO()
    with Progress(file) as shown:
        task = shown.task("attack base", total=20, done=10)
        for _ in range(10):
            time.now += 2
            task.advance(note="loss 0.31")
    assert file.getvalue().splitlines() == [
        "attack base: 13 of 20, 0:14 left, loss 0.31",
        "attack base: 16 of 20, 0:08 left, loss 0.31",
        "attack base: 19 of 20, 0:02 left, loss 0.31",
        "attack base: 20 of 20, done in 0:20, loss 0.31",
    ]


def test_groups_of_a_batch_that_are_done_count_for_the_time_left(monkeypatch):
    """Pictures of two sizes are searched one size after the other, and counted together."""
    time = Clock(monkeypatch)
    task = Progress(io.StringIO()).task("pgd", total=2)
    time.now += 10
    task.advance(0, part=1)
    task.hold(1)
    time.now += 1
    task.advance(0, part=0.1)
    assert task.left == "0:09 left"
    task.advance(2)
    assert task.left.startswith("done")


def test_a_terminal_gets_bars():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    with Progress(file) as shown:
        task = shown.task("train [RR]\x1b[2J", total=2)
        task.advance(note="a")
        shown.say("a line [of] text\x1b[2J")
        task.advance()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "train [RR]?[2J" in text and "2 of 2" in text and "a line [of] text?[2J" in text


@pytest.mark.parametrize("close", [True, False])
def test_an_output_that_went_away_is_no_error(close):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    file = io.StringIO() if close else Gone()
    if close:
        file.close()
    with Progress(file) as shown:
        shown.task("a", total=1).advance()
        shown.say("b")
    console(file).print("c")


def test_untrusted_text_is_shown_as_it_is():
    file = io.StringIO()
    console(file).print("[red]x[/red] :smile: \x1b[31my\x07\u202e")
    assert file.getvalue() == "[red]x[/red] :smile: ?[31my??\n"
    assert printable("a\tb\nc\r\u00a0d") == "a\tb\nc  d"


def test_clock():
    assert [clock(s) for s in (0, 59.6, 130, 3725)] == ["0:00", "1:00", "2:10", "1:02:05"]


def test_a_poor_encoding_loses_characters_not_lines():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    console(file).print("a \u2192 b")
    assert raw.getvalue() == b"a ? b\n"


@pytest.mark.parametrize("width", [1, 2, 5, 20, 39])
def test_a_table_loses_nothing_on_a_narrow_terminal(width, monkeypatch):
    def printed(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        table = Table(box=None, pad_edge=False)
        for place in range(6):
            table.add_column(f"column {place}", justify="right" if place % 2 else "left", no_wrap=place == 5)
        table.add_row("several words that may wrap", "0.999", "a-name-that-is-long.png", "12", "", "not to be wrapped")
        print_whole(table, console(file := io.StringIO()))
        return Counter(character for character in file.getvalue() if not character.isspace())

    assert printed(width) == printed(300)
