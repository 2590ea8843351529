"""A text file of targets that one picture is made for: one a line, or JSON lines with prompts of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import CORPUS, refuse_items, refuse_records
from mm_cb.core.folding import is_blank
from mm_cb.core.reading import json_lines, read_plain, refuse_replaced, refuse_typos, shown, unfit_in_file
from mm_cb.data.behaviors_file import Behavior

_KINDS = (".txt", ".jsonl")


def read_corpus(path: Path) -> list[Behavior]:
    """The rows of a corpus, named by file and line; a line of text has an empty prompt.

    Args:
        path: ``.txt``: a target a line, blank lines are passed over. ``.jsonl``: ``{"target": ..., "prompt": ...}``,
            the prompt optional.

    Raises:
        UserError: If the file cannot be read, is of another kind, holds no target, or a line is not as expected (file
            and line number).
    """
    if path.suffix not in _KINDS:
        raise UserError(
            f"`--corpus` must be a .txt file with a target a line, or a .jsonl file of objects with `target` and "
            f"perhaps `prompt`, got `{path}`; name it by what it holds."
        )
    rows = _objects(path) if path.suffix == ".jsonl" else _lines(path)
    if not rows:
        raise UserError(f"`{path}` must hold a target a line, it holds none.")
    return rows


def target_lines(path: Path, what: str, held: str, json: str) -> Iterator[tuple[int, str]]:
    """Targets that stand one a line in a text file, trimmed, with their lines' numbers.

    Args:
        path: The file; blank lines are passed over.
        what: What it is called: "corpus".
        held: What it holds: "a target a line".
        json: What to do with JSON that stands there.

    Raises:
        UserError: If the file cannot be read, or a line is no target (file and line number).
    """
    content = read_plain(path, what)
    refuse_records(content, str(path), f"{held},")
    for number, line in enumerate(content.split("\n"), start=1):
        if is_blank(text := line.strip()):
            continue
        if text[0] == "{" and text[-1] == "}":
            raise UserError(f"{path}:{number}: expected a target, got what looks like JSON; {json}.")
        if reason := unfit_in_file(text):
            raise UserError(f"{path}:{number}: the target cannot be used: {reason}.")
        yield number, text


def _lines(path: Path) -> list[Behavior]:
    found = target_lines(path, "corpus", "a target a line", "name the file .jsonl if it is")
    return [Behavior(f"{path.name}:{number}", "", text, None, where=f"{path}:{number}") for number, text in found]


def _objects(path: Path) -> list[Behavior]:
    rows = []
    for where, record in json_lines(path, "corpus"):
        refuse_items(record, CORPUS, where)
        refuse_typos(record, ("target", "prompt"), where)
        refuse_replaced({key: record.get(key) for key in ("target", "prompt")}, where)
        target, prompt = record.get("target"), record.get("prompt")
        if not isinstance(target, str) or is_blank(target):
            raise UserError(f"{where}: `target` must be a text that is not empty, got {shown(target)}.")
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"{where}: `prompt` must be a text or null, got {shown(prompt)}.")
        rows.append(Behavior(f"{path.name}:{where.rpartition(':')[2]}", prompt or "", target, None, where=where))
    return rows
