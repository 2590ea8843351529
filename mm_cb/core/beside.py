"""Work in a process of its own while the first one does something else: small models leave a second core idle."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mm_cb.core.closing import say
from mm_cb.core.errors import UserError
from mm_cb.core.provenance import available_cores


@contextlib.contextmanager
def beside(work: Callable[..., None], *given: Any, log: Path) -> Iterator[None]:
    """Do a piece of work while the block runs, and wait for it at the block's end; on a single core before the block.

    Args:
        work: A module's function, found by its name in a new process, which takes what it needs from its arguments and
            leaves what it makes in files.
        given: Its arguments, plain enough to be sent there.
        log: Gets what it prints. Not made on a single core.

    Raises:
        UserError: What the work raised of this kind; and if it ended in another way, naming ``log``.
    """
    if available_cores() < 2:
        work(*given)
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    start = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads without what they hold
    ours, theirs = start.Pipe(duplex=False)
    process = start.Process(target=_run, args=(work, given, str(log), theirs))
    process.start()
    theirs.close()
    try:
        yield
        if process.is_alive():
            say(f"Waiting for what runs beside this ({log}).")
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    if ours.poll():
        with contextlib.suppress(EOFError):
            raise UserError(ours.recv())
    if process.exitcode:
        raise UserError(f"a process ended with status {process.exitcode}; its last words are in `{log}`.")


def _run(work: Callable[..., None], given: tuple[Any, ...], log: str, told: Connection) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    try:
        work(*given)
    except UserError as error:
        told.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
