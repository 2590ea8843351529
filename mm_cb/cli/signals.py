"""Signals that end a command: what a scheduler or a closed terminal sends does what Ctrl-C does."""

import math
import os
import signal
import time
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ONE_SENDER = 5.0
"""Seconds within which a second signal is taken for the first: a launcher and its scheduler both send one."""
_received: list[int] = []


def listen() -> None:
    """Raise KeyboardInterrupt in this process when such a signal comes; one that is ignored (``nohup``) stays so."""
    owner, last = os.getpid(), -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:  # a worker that was forked off: it has nothing of its own to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if time.monotonic() - last > _ONE_SENDER:
            last = time.monotonic()
            _received.append(number)
            raise KeyboardInterrupt

    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def received() -> int | None:
    """The number of the last of these signals; None if there was none."""
    return _received[-1] if _received else None
