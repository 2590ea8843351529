"""What the ``mm-cb`` script starts: it imports all the rest, so that Ctrl-C is one line from the first moment on.

The package itself cannot do so: Python runs the whole of ``mm_cb/__init__.py`` before any of its modules.
"""

import os
import signal
from types import FrameType


def main() -> None:
    """Entry point of the ``mm-cb`` command."""
    held = {number: signal.getsignal(number) for number in _ENDING}
    for number, before in held.items():
        if before in (signal.SIG_DFL, signal.default_int_handler):  # what is ignored (``nohup``) stays so
            signal.signal(number, _end)
    from mm_cb.cli import main as command

    for number, before in held.items():
        signal.signal(number, before)
    command()


_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _end(number: int, frame: FrameType | None) -> None:
    """Leave at once: nothing has begun, and an import may take an exception for something else."""
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    try:
        os.write(2, f"mm-cb: {what} before anything had begun.\n".encode())
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    main()
