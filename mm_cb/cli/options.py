"""Options that several commands share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_cb.attacks.config import DTYPES
from mm_cb.core.closing import TYPED
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.file_kinds import refuse_records
from mm_cb.core.folding import is_blank
from mm_cb.core.limits import LIMITS, OutOfRange
from mm_cb.core.reading import read_plain, unfit

_MODEL, _RUN = "Model and data", "Run"
"""Headings of --help."""


def option(metavar: str, about: str, panel: str | None = None) -> Any:
    """A flag with a value that is no number, and the heading that it stands under."""
    return typer.Option(metavar=metavar, help=about, rich_help_panel=panel)


def switch(flag: str, about: str, panel: str | None = None) -> Any:
    """A flag without a value."""
    return typer.Option(flag, help=about, rich_help_panel=panel)


Out = Annotated[Path, option("DIR", "Run directory; an existing one is gone on with.", _RUN)]
Model = Annotated[str, option("M", "Hub id, local directory, or `miniature`.", _MODEL)]
Adapter = Annotated[str | None, option("A", "Directory of a PEFT adapter.", _MODEL)]


ProbeFolder = Annotated[
    str | None, option("DIR", "A harmfulness probe (mm-cb probe) that withholds answers it flags.", _MODEL)
]


def behaviors_file(named: Path | None) -> Path | None:
    """What is meant by ``--behaviors``: a file, or an embedded model's own by its name."""
    from mm_cb.data.behaviors_file import behaviors_path

    return None if named is None else behaviors_path(named)


def requests_for(model: str) -> str:
    """What stands behind ``--behaviors`` in a command: an embedded model's own by its name, else a file to be made."""
    from mm_cb.core.embedded import embedded

    guest = embedded(model)
    return guest.name if guest is not None and guest.behaviors is not None else "behaviors.jsonl"


Behaviors = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="Behaviours file (JSONL), or `miniature` for the embedded model's.",
        callback=behaviors_file,
        rich_help_panel=_MODEL,
    ),
]


def number(
    setting: str, about: str, panel: str | None = None, *, metavar: str = "N", flag: str = "", also: str = ""
) -> Any:
    """A flag whose value is a number within its `LIMITS`.

    Args:
        setting: Its name there; with dashes it is the flag's.
        about: For ``--help``, in front of the range.
        panel: The heading that it stands under.
        metavar: What stands behind the flag in ``--help``.
        flag: The flag, where it is called otherwise.
        also: Another spelling of it.
    """
    flag, limit = flag or f"--{setting.replace('_', '-')}", LIMITS[setting]

    def read(text: Any) -> int | float:
        try:
            return limit.read(flag, text)
        except OutOfRange as error:  # a ValueError, which the parser would put into words of its own
            raise UserError(str(error)) from error

    return typer.Option(
        *([flag, also] if also else [flag]),
        parser=read,
        metavar=metavar,
        help=f"{about}  [{limit.range}]",
        rich_help_panel=panel,
    )


Seed = Annotated[int, number("seed", "Seed of everything random in this run.", _RUN)]
Device = Annotated[str, option("D", "cpu, cuda, cuda:1.", _RUN)]


RayCount = Annotated[
    str | None,
    option("[N]", "N processes of Ray side by side, a GPU or core each.  [default: as many as Ray has]", _RUN),
]


def known_dtype(dtype: str | None) -> str | None:
    """Refuse a dtype that no model is loaded in.

    Raises:
        UserError: If it is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return dtype


Dtype = Annotated[
    str, typer.Option(metavar="T", help=f"{', '.join(DTYPES)}.", callback=known_dtype, rich_help_panel=_RUN)
]
System = Annotated[
    Path | None,
    typer.Option(
        "--system",
        metavar="FILE",
        help="Text file put in front of every request, such as a safety prompt.",
        rich_help_panel=_MODEL,
    ),
]

Thinking = Annotated[
    bool,
    typer.Option(
        "--thinking",
        help="Let it think first; what an attack forces begins a thought.  [default: behind an empty thinking block]",
        rich_help_panel=_MODEL,
    ),
]

OldSettings = Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)]
"""``key=value`` as it was accepted before there were flags: taken only to be answered by `refuse_old_settings`."""


def refuse_old_settings(words: Sequence[str] | None, flags: Mapping[str, str]) -> None:
    """Answer ``key=value`` with the flags that these settings are now.

    Args:
        words: What stood behind the options.
        flags: Key → flag: ``{"max_new_tokens": "--max-new-tokens"}``; a switch ends in ``!`` and takes no value. Of
            ``key=value:size`` the part before the colon may be a key of its own, whose value is the size.

    Raises:
        UserError: If there is any word.
    """
    if not words:
        return
    spelled, strange = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and word.partition(":")[0] in flags:
            key, _, value = word.partition(":")
        if not equals or key not in flags:
            strange.append(word)
        elif flags[key].endswith("!"):
            spelled += [flags[key][:-1]] if value.lower() == "true" else []
        else:
            spelled.append(f"{flags[key]} {value}")
    if strange:
        raise UserError(f"unexpected `{strange[0]}`: settings are flags, see --help.")
    raise UserError(f"settings are flags now: write `{' '.join(spelled) or 'nothing'}` instead of `{' '.join(words)}`.")


_MAY_BE_EMPTY = ("--suffix", "--judge-system", "--target")
_WORDS = (
    *(*_MAY_BE_EMPTY, "--subject", "--refusal", "--label", "--judge-model", "--endpoint", "--judge-endpoint"),
    *("--generator", "--generator-url", "--describer-url"),
    *("--requester", "--requester-url", "--executor", "--executor-url"),
)
"""Options whose values are sent or written as text, and are no paths: these may be any bytes."""


def refuse_nowhere() -> None:
    """Refuse to start in a folder that is gone.

    Raises:
        UserError: As said.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the folder that this was started in is gone; start it in another.") from error


def refuse_unset(arguments: Sequence[str]) -> None:
    """Refuse values that a shell left empty or did not expand: an empty path would be the folder that one is in.

    Raises:
        UserError: Naming the option.
    """
    for before, word in zip(("", *arguments), arguments, strict=False):
        name, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        told = f"`{name}`" if name.startswith("--") else "every argument"
        if "\0" in word:
            raise UserError(f"{told} cannot be used: it holds a NUL character.")
        if equals and not value and name not in _MAY_BE_EMPTY:
            raise UserError(f"{told} must be a text or number, got nothing (is a variable of the shell not set?).")
        if name in _WORDS and (reason := unfit(value)):
            raise UserError(f"{told} cannot be used: {reason}; write it in the encoding of this terminal.")
        if value.startswith("~/"):
            raise UserError(f"{told} must be a path, but no shell expanded `{value}`; leave out the quotes or the `=`.")


def given(*flags: str) -> list[str]:
    """Those of some flags that stand on the command line, whatever their defaults are."""
    return [flag for flag in flags if any(word.partition("=")[0] == flag for word in TYPED)]


def read_system(path: Path | None) -> str | None:
    """The operator's text in a file.

    Raises:
        UserError: If it cannot be read as text, or is empty.
    """
    if path is None:
        return None
    text = read_plain(path, "text of `--system`").strip()
    refuse_records(text, str(path), "the text of `--system`", by_line=False)
    if is_blank(text):
        raise UserError(f"`--system` must hold a text, but `{path}` is empty.")
    return text
