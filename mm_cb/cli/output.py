"""Standard output as a command needs it: what happens to its reader or its disk is no reason to stop the work."""

import errno
import io
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.ECONNRESET)


class _Patient(io.RawIOBase):
    """A stream of bytes that takes everything, and remembers why it could not be written."""

    def __init__(self, behind: TextIO) -> None:
        super().__init__()
        self._behind = behind  # what nobody refers to is closed
        self._gone = False
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        left = memoryview(content)
        try:
            while left.nbytes and not self._gone and self.error is None:
                left = left[os.write(self.fileno(), left) :]
        except OSError as e:
            self._gone = e.errno in _GONE
            self.error = None if self._gone else e
        return memoryview(content).nbytes

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._behind.isatty()

    def fileno(self) -> int:
        return self._behind.fileno()


_output: list[_Patient] = []


def listen() -> None:
    """Put a patient stream behind standard output: a reader that has seen enough (``| head``) changes nothing.

    What is closed (``>&-``) is as if nobody wanted it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # to the command's end
    if isinstance(sys.stdout, io.TextIOWrapper):
        at_once = sys.stdout.write_through
        _output[:] = [_Patient(sys.stdout)]
        bytes_: Any = _output[0] if at_once else io.BufferedWriter(_output[0])
        lines = bool(sys.stdout.line_buffering)
        sys.stdout = io.TextIOWrapper(bytes_, sys.stdout.encoding, "replace", None, lines, at_once)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail


def lost() -> OSError | None:
    """Why some of what was printed was not written; None if all was, or its reader went away."""
    sys.stdout.flush()
    return _output[0].error if _output else None
