"""A text file of targets that one picture is made for: one a line, or JSON lines with prompts of their own."""

from __future__ import annotations

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


def _lines(path: Path) -> list[Behavior]:
    rows = []
    content = read_plain(path, "corpus")
    refuse_records(content, str(path), "a target a line,")
    for number, line in enumerate(content.split("\n"), start=1):
        if is_blank(text := line.strip()):
            continue
        where = f"{path}:{number}"
        if text[0] == "{" and text[-1] == "}":
            raise UserError(f"{where}: expected a target, got what looks like JSON; name the file .jsonl if it is.")
        if reason := unfit_in_file(text):
            raise UserError(f"{where}: the target cannot be used: {reason}.")
        rows.append(Behavior(f"{path.name}:{number}", "", text, None))
    return rows


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
        rows.append(Behavior(f"{path.name}:{where.rpartition(':')[2]}", prompt or "", target, None))
    return rows
