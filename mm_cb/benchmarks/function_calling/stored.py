"""Answers that BFCL's own program stored, or another one: a file or a folder of JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_cb.benchmarks.function_calling.questions import is_scored, version_and_category
from mm_cb.benchmarks.rows import json_lines
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import ANSWERS, CALL_ANSWERS


def answer_files(path: Path) -> list[Path]:
    """The files of stored answers: the file itself, or of a folder those named as BFCL names them, else all.

    Raises:
        UserError: If there is none.
    """
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".json", ".jsonl"))
    if any(is_scored(file) for file in files):
        files = [file for file in files if is_scored(file)]
    if not files:
        raise UserError(f"`{path}` must be a file of stored answers or a folder of such, there is none.")
    return files


def read_answers(files: Sequence[Path]) -> dict[str, str]:
    """The answers by question id; those to categories that are left out are passed over.

    Raises:
        UserError: If a question is answered twice, or an answer is no text.
    """
    found: dict[str, str] = {}
    for file in files:
        for row in json_lines(file, (CALL_ANSWERS, ANSWERS)):
            id = str(row.values.get("id"))
            try:
                if version_and_category(id) is None:
                    continue
            except ValueError as error:
                raise UserError(f"{row.where}: {error}.") from error
            said = row.values.get("result", row.values.get("completion"))
            if row.values.get("completion", said) != said:
                raise UserError(f"{row.where}: `result` and `completion` must be one text, they differ; keep one.")
            if not isinstance(said, str):
                raise UserError(
                    f"{row.where}: `result` must be the model's text, got {type(said).__name__}; answers of a server's "
                    "own function calling are not read."
                )
            if id in found:
                raise UserError(f"{row.where}: every question must be answered once, `{id[:80]}` comes more than once.")
            found[id] = said
    return found
