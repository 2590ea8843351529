"""Text on its way to a terminal: nothing that it would act on, no error where nobody reads. Imports nothing heavy."""

import contextlib
import shutil
import sys
from typing import Any, TextIO

_NARROWEST, _WIDEST = 20, 100


def columns() -> int:
    """Columns that prose may have: the terminal's, or 80 where there is none; never more than 100 or less than 20."""
    return max(_NARROWEST, min(shutil.get_terminal_size((80, 24)).columns, _WIDEST))


def put(text: str) -> None:
    """Print a line, or several, as they are, without control characters."""
    QuietFile(sys.stdout).write(f"{printable(text)}\n")


def printable(text: str) -> str:
    """Text without anything a terminal would act on; line feeds and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " if c.isspace() else "?" for c in text)


class QuietFile:
    """A text stream whose reader may go away (writing then does nothing) and whose encoding may be poor."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self._file.write(text)
            except UnicodeEncodeError as e:
                self._file.write(text.encode(e.encoding, "replace").decode(e.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody reads."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self._file.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
