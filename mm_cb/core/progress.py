"""What a person sees while something long runs, and terminal output that untrusted text cannot take over."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from mm_cb.core.terminal import QuietFile, printable

_PLAIN_SECONDS = 5.0
_DAY = 86_400.0
_ANY = 10_000
"""Columns that any table fits into."""
_MEASURED = 2
"""Calls of `Task.advance` before its estimate is believed: the first one may hold what happens only once."""


class _SafeConsole(Console):
    """A console that shows strings as they are: no markup, no escape sequences out of file names or model text."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(file: TextIO | None = None) -> Console:
    """A rich console on ``file`` (standard output by default) for text that may come from anywhere.

    Strings, also those inside tables, are never read as markup and lose their control characters; a reader that goes
    away (``| head``) does not end the program.
    """
    target: Any = QuietFile(sys.stdout if file is None else file)
    return _SafeConsole(file=target, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_whole(table: Table, out: Console | None = None) -> None:
    """Print a table of which nothing is cut off: words are folded, and a narrower terminal wraps its lines."""
    out = console() if out is None else out
    for column in table.columns:
        column.overflow = "fold"
    least, width = Measurement.get(out, out.options.update(max_width=_ANY), table).minimum, out.width
    out.width = max(width, least)
    out.print(table)
    out.width = width


class CountedWork:
    """One counted piece of work inside a `Progress`; made by `Progress.task`."""

    def __init__(
        self, description: str, total: int, done: int, changed: Callable[["CountedWork", bool], None], shorter: str = ""
    ) -> None:
        """Start counting at ``done`` (work of an earlier, interrupted run) out of ``total``; see `Progress.task`."""
        self.description = printable(description)
        self.total = total
        self.done = done
        self.note = ""
        self.shorter = shorter
        self._part, self._whole, self._measured = 0.0, 0, 0
        self._resumed_at = done
        self._started = time.monotonic()
        self._changed = changed

    def advance(self, n: int = 1, note: str = "", part: float = 0.0) -> None:
        """Count ``n`` more as done, and ``part`` of the next ones; ``note`` is shown behind the count until then."""
        complete_before = self.done >= self.total
        self.done += n
        self._whole = 0 if n else self._whole
        self._part = self._whole + part
        self._measured += 1
        self.note = printable(note)
        self._changed(self, self.done >= self.total and not complete_before)

    def hold(self, n: int) -> None:
        """Take ``n`` of the next ones as done, though they are not counted yet: further parts come on top."""
        self._whole += n
        self._part = self._whole

    @property
    def left(self) -> str:
        """``"2:10 left"``, from the mean time per item of this process; empty before the first item is done."""
        if self.done >= self.total:
            return f"done in {clock(time.monotonic() - self._started)}"
        return "" if (seconds := self.seconds_left) is None else f"{clock(seconds)} left"

    @property
    def seconds_left(self) -> float | None:
        """From the mean time per item of this process; None before anything is done."""
        worked = self.done + self._part - self._resumed_at
        elapsed = time.monotonic() - self._started
        return elapsed / worked * max(0.0, self.total - self.done - self._part) if worked > 0 else None

    def warning(self) -> str:
        """What to say, once, of a task that will take more than a day; empty where there is nothing to say."""
        seconds = self.seconds_left
        if not self.shorter or self._measured < _MEASURED or seconds is None or seconds < _DAY:
            return ""
        shorter, self.shorter = self.shorter, ""
        return f"{self.description}: about {seconds / _DAY:,.1f} days left at this speed. Shorter: {shorter}."

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total}", self.left, self.note]
        return f"{self.description}: {', '.join(part for part in parts if part)}"


class Progress:
    """Shows tasks with count and time left: live bars on a terminal, elsewhere at most one line every few seconds.

    Example::

        with Progress() as progress:
            task = progress.task("attack base", total=len(behaviors), done=len(finished))
            for behavior in rest:
                ...
                task.advance(note="loss 0.31")
    """

    def __init__(self, file: TextIO | None = None) -> None:
        """Show on ``file``, standard output by default."""
        self._console = console(file)
        self._bars: RichProgress | None = None
        self._bar_ids: dict[int, Any] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        """Start the live display, if the output is a terminal."""
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f} of {task.total:.0f}", markup=False),
                TextColumn("{task.fields[left]}", markup=False),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bars = RichProgress(*columns, console=self._console, refresh_per_second=4)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def task(self, description: str, total: int, done: int = 0, shorter: str = "") -> CountedWork:
        """A new task; ``done`` items were finished by an earlier run and do not count for the time left.

        ``shorter`` says what would shorten it; that is told once if it will take more than a day.
        """
        task = CountedWork(description, total, done, self._show, shorter)
        if self._bars is not None:
            self._bar_ids[id(task)] = self._bars.add_task(
                task.description, total=total, completed=done, left="", note=""
            )
        return task

    def say(self, text: str) -> None:
        """Print a line of its own, above the bars if there are any."""
        self._console.print(text)

    def _show(self, task: CountedWork, completed: bool) -> None:
        if warning := task.warning():
            self.say(warning)
        if self._bars is not None:
            self._bars.update(self._bar_ids[id(task)], completed=task.done, left=task.left, note=task.note)
        elif completed or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(str(task))


def clock(seconds: float) -> str:
    """``130`` -> ``"2:10"``, ``3725`` -> ``"1:02:05"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
