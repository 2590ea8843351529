"""What commands say: words that fit the terminal, paths and ids one can read, lists, and what to type next."""

import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mm_cb.core.terminal import columns, put

_INDENT = "  "
_WORDS = re.compile(r"(?:[^\s'\"]|'[^']*'|\"[^\"]*\")+")
"""What a shell takes for one word, quotes included."""


TYPED: list[str] = []
"""The words behind ``mm-cb`` that this process was started with; empty where it was not."""


class Hint(NamedTuple):
    """One thing to type next."""

    why: str
    words: Sequence[str | Path]
    """Behind ``mm-cb``; a word in capitals stands for what only the user knows. Empty = the line before says it all."""


def here(path: str | Path) -> str:
    """A path as one types it: from the working directory where it lies below, else as it was given."""
    try:
        below = os.path.relpath(os.path.abspath(path))
    except FileNotFoundError:  # the working directory was deleted meanwhile
        return str(path)
    named = str(path) if below.startswith(os.pardir) else below
    return f"./{named}" if named.startswith("-") else named  # else it would be read as a flag


def cut(name: str, most: int) -> str:
    """A name of at most so many characters, eight at least, cut in the middle: ends of ids tell them apart."""
    most = max(8, most)
    if len(name) <= most:
        return name
    kept = most - 2
    return f"{name[: kept - kept // 2]}..{name[len(name) - kept // 2 :]}"


def cut_path(path: str, most: int) -> str:
    """A picture's path in its run: the file whole, its folder, which is a behaviour's, cut in the middle."""
    folder, slash, file = path.removeprefix("images/").rpartition("/")
    return f"{cut(folder, most - len(file) - 1)}{slash}{file}" if slash else cut(path, most)


def say(text: str, indent: str = "") -> None:
    """Print prose that is wrapped between words; no path or id is broken."""
    put("\n".join(wrapped(text, columns(), "", indent)))


def wrapped(text: str, width: int, first: str = "", further: str = "") -> list[str]:
    """Lines of at most so many columns, broken between words alone; one at least."""
    found = textwrap.wrap(
        text,
        max(1, width),
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return found or [first.rstrip()]


def listing(rows: Iterable[tuple[str, str, str]]) -> None:
    """Print what there is by name, what each is, and below it what it needs."""
    for name, about, needs in rows:
        put(name)
        say(f"    {about}", "    ")
        if needs:
            say(f"    needs {needs}", "      ")


def files(named: Mapping[str, str | Path]) -> None:
    """Print where things are: ``results  runs/attack/results.json``."""
    longest = max(map(len, named))
    for name, path in named.items():
        put(f"{name:{longest}}  {here(path)}")


def command(words: Iterable[str | Path], indent: str = _INDENT) -> str:
    """A command of ours, see `shell`."""
    return shell(
        shlex.join(["mm-cb", *(here(word) if isinstance(word, Path) else str(word) for word in words)]), indent
    )


def shell(text: str, indent: str = _INDENT, first: str | None = None) -> str:
    """A command as a shell takes it: over several lines, with a backslash, where one is too narrow.

    Args:
        text: The command, or a comment.
        indent: In front of it.
        first: In front of its first line, if that is something else.
    """
    if text.startswith("#"):
        return "\n".join(wrapped(text, columns(), indent, f"{indent}# "))
    pieces: list[str] = []
    for word in _WORDS.findall(text):
        if pieces and re.fullmatch(r"--[\w-]+", pieces[-1]) and not word.startswith("-"):
            pieces[-1] += f" {word}"  # a flag and its value stay together
        else:
            pieces.append(word)
    lines = [(indent if first is None else first) + pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) > columns() - 2:
            lines[-1] += " \\"
            lines.append(indent + 2 * _INDENT + piece)
        else:
            lines[-1] += f" {piece}"
    return "\n".join(lines)


def typed(path: str | Path) -> str:
    """A path inside a command that stands in a sentence."""
    return shlex.quote(here(path))


def base_folder(folder: Path) -> str:
    """Where the undefended model's run goes, beside a breaker's: ``runs/attack-rr`` → ``runs/attack-base``."""
    name = folder.name
    return here(folder.with_name(f"{name.removesuffix('-rr')}-base"))


def again(change: Mapping[str, str | None], more: Sequence[str] = ()) -> list[str]:
    """The command that was typed with some flags changed, or left out (None); empty where there was none.

    Args:
        change: Flag → its value now; one that was not typed is added, if it has a value.
        more: Words for the end; ``key=value`` there takes the place of one that was typed.
    """
    words: list[str] = []
    keys = {word.partition("=")[0] for word in more if "=" in word}
    change, left = dict(change), iter(TYPED)
    for word in left:
        flag, equals, _ = word.partition("=")
        if equals and flag in keys:
            continue
        if flag not in change or not flag.startswith("--"):
            words.append(word)
            continue
        if not equals:
            next(left, None)
        if (value := change[flag]) is not None:
            words += [flag, value]
            change[flag] = None
    added = [word for flag, value in change.items() if value is not None for word in (flag, value)]
    return [*words, *added, *more] if words else []


def what_next(*steps: Hint | None) -> None:
    """Print what to type next, each command below what it is for, as a shell takes it."""
    put("\nnext")
    for step in (step for step in steps if step is not None):
        say(f"{_INDENT}# {step.why}", f"{_INDENT}# ")
        if step.words:
            put(command(step.words))
