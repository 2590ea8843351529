"""What the command line says and returns when a command does not come to its end."""

import contextlib
import datetime
import errno
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mm_cb
from mm_cb.core.errors import UserError, message_line, unknown
from mm_cb.core.files import no_room
from mm_cb.core.user_code import users_fault

DONE, BUG, USER, INTERRUPTED = 0, 1, 2, 130
_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EACCES, errno.EPERM)
"""What is wrong with a path that somebody gave, whoever met it first."""


def explain(error: BaseException, arguments: list[str]) -> int:
    """Report a failed command on standard error and return its exit code.

    Args:
        error: What ended the command.
        arguments: The command line without the program's name.

    Returns:
        2 after one line when the user can fix it, else 1 after the traceback and the path of a log file.
    """
    message = _users_message(error)
    if message is not None:
        _say(f"mm-cb: {message}")
        return USER
    trace = "".join(traceback.format_exception(error))
    log = _write_log(trace, arguments)
    _say(trace.rstrip())
    _say(f"mm-cb: this is a fault of mm-cb, not of your input; please report it with the log {log}")
    return BUG


def script(main: Callable[[], None]) -> None:
    """Run a script; what its user can put right ends it with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.exit(explain(error, sys.argv[1:]))


def interrupted(arguments: list[str], number: int | None = None) -> int:
    """Say how to go on after an interrupt, or the signal of this number; returns the exit code."""
    what = "interrupted" if number is None else f"ended by {signal.Signals(number).name}"
    _say(message_line(f"mm-cb: {what}; run the same command again to go on: {shlex.join(['mm-cb', *arguments])}"))
    return INTERRUPTED if number is None else 128 + number


def was_interrupted(error: BaseException) -> bool:
    """Whether an error came of an interrupt: what was being imported or written may fail over it in its own words."""
    chain: list[BaseException] = []
    before: BaseException | None = error
    while before is not None and before not in chain:
        chain.append(before)
        before = before.__cause__ or before.__context__
    return any(isinstance(one, KeyboardInterrupt) for one in chain)


def unprinted(error: OSError) -> int:
    """Say that what a command printed could not be written, though its work is done; returns the exit code."""
    _say(
        f"mm-cb: standard output could not be written: {error.strerror}; the command itself is done, send its output "
        "to another place to see it."
    )
    return USER


def _users_message(error: BaseException) -> str | None:
    """The one line for an error the user can fix, or None for a fault of ours."""
    if isinstance(error, UserError) or _is_image_file_error(error):
        return message_line(str(error))
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        return message_line(_usage_message(error))
    if why := no_room(error):
        place = getattr(error, "filename", None)
        return message_line(f"`{place}` could not be written: {why}" if place else why)
    if isinstance(error, OSError) and error.errno in _PATHS and error.filename:
        return message_line(
            f"`{error.filename}` cannot be used: {error.strerror}; give another path or change its rights."
        )
    return users_fault(error)


def _usage_message(error: Any) -> str:
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if context is None:
        return str(error.format_message())
    if option and getattr(error, "possibilities", ()) is not None and type(error).__name__ == "NoSuchOption":
        shown = (one for one in context.command.params if one.param_type_name == "option" and not one.hidden)
        return str(unknown("option", option, [name for parameter in shown for name in parameter.opts]))
    return f"{str(error.format_message()).rstrip('.')}. See `{context.command_path} --help`."


def _is_image_file_error(error: BaseException) -> bool:
    module = sys.modules.get("image_attacks")  # not imported: then it cannot have raised
    return module is not None and isinstance(error, module.ImageFileError)


def _write_log(trace: str, arguments: list[str]) -> Path:
    head = (
        f"mm-cb {mm_cb.__version__}, Python {sys.version.split()[0]}, "
        f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}\nmm-cb {shlex.join(arguments)}\n\n"
    )
    out = _out_directory(arguments)
    if out is not None:
        with contextlib.suppress(OSError):
            log = out / "error.log"
            log.write_text(head + trace, encoding="utf-8", errors="backslashreplace")
            return log.resolve()
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="mm-cb-", suffix=".log", delete=False
    ) as file:
        file.write(head + trace)
    return Path(file.name)


def _out_directory(arguments: list[str]) -> Path | None:
    """The run directory that the command line names, if it is one already."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--out":
            given = value if equals else "".join(arguments[position + 1 : position + 2])
            return Path(given) if given and (Path(given) / "run.json").is_file() else None
    return None


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201 (the command line's own voice)
