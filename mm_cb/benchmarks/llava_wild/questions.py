"""The 60 questions with their pictures, captions and reference answers, from the original files or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mm_cb.benchmarks.base import Question
from mm_cb.benchmarks.llava_wild.reviews import CATEGORIES
from mm_cb.benchmarks.pictures import picture_inside, stored_picture
from mm_cb.benchmarks.rows import DataRow, json_lines, read_rows, texts
from mm_cb.core.errors import UserError
from mm_cb.core.paths import protocol_file
from mm_cb.core.reading import shown
from mm_cb.core.records import JsonObject
from mm_cb.data.pictures import EncodedPicture

_FILES = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
_COLUMNS = ("question_id", "question", "image", "caption", "gpt_answer", "category")


@dataclass(frozen=True)
class WildQuestion:
    """One question."""

    id: str
    category: str
    text: str
    caption: str
    """What the judge reads in place of the picture."""
    reference: str
    """The reference answer, written by a text model from the caption."""
    picture: EncodedPicture


@cache
def protocol() -> JsonObject:
    """The protocol as shipped."""
    content: JsonObject = protocol_file("llava_wild")
    return content


def read_questions(data: str) -> list[WildQuestion]:
    """The questions of a local copy in the original's layout, or of a data set with the hub's columns.

    Raises:
        UserError: If files, columns or pictures are missing, or a question has no caption or reference answer.
    """
    folder = Path(data)
    original = any((folder / name).is_file() for name in _FILES)
    questions = _from_files(folder) if original else [_from_row(row) for row in read_rows(data, "train")]
    if len({question.id for question in questions}) < len(questions) or not questions:
        raise UserError(f"`{data}` must hold questions with different ids, got {len(questions)}.")
    return questions


def as_asked(question: WildQuestion) -> Question:
    """The question as it is put to a model, which sees the picture and neither caption nor reference."""
    return Question(question.id, question.text, (question.picture,), category=question.category)


def fingerprint(questions: list[WildQuestion]) -> str:
    """SHA-256 over everything that is asked and compared, pixels included."""
    total = hashlib.sha256()
    for q in questions:
        total.update(json.dumps([q.id, q.category, q.text, q.caption, q.reference, list(q.picture.size)]).encode())
        total.update(q.picture.open().tobytes())
    return total.hexdigest()


def _from_files(folder: Path) -> list[WildQuestion]:
    asked, contexts, answers = (list(json_lines(folder / name)) for name in _FILES)
    captions, references = _by(contexts, "image"), _by(answers, "question_id")
    questions = []
    for row in asked:
        id, image, text, category = texts(row, ("question_id", "image", "text", "category"))
        where = f"{row.where}: question {id}"
        if lacking := [
            name for name, held in (("context", image in captions), ("answer", id in references)) if not held
        ]:
            raise UserError(f"{where} lacks its {', '.join(lacking)}.")
        caption, (reference,) = _caption(captions[image]), texts(references[id], ("text",))
        picture = picture_inside(folder, f"images/{image}", where).checked()
        questions.append(WildQuestion(id, _category(category, where), text, caption, reference, picture))
    return questions


def _by(rows: Sequence[DataRow], key: str) -> dict[str, DataRow]:
    """Rows by one column, whose entries must differ."""
    found: dict[str, DataRow] = {}
    for row in rows:
        (name,) = texts(row, (key,))
        if name in found:
            raise UserError(f"{row.where}: `{key}` must differ from line to line, {shown(name)} comes more than once.")
        found[name] = row
    return found


def _from_row(row: DataRow) -> WildQuestion:
    if missing := [name for name in _COLUMNS if name not in row.values]:
        raise UserError(f"{row.where} must have the columns {', '.join(_COLUMNS)}; it lacks {', '.join(missing)}.")
    id, text, reference, category = texts(row, ("question_id", "question", "gpt_answer", "category"))
    picture = stored_picture(row.values["image"], f"{row.where}: `image`")
    return WildQuestion(id, _category(category, row.where), text, _caption(row), reference, picture)


def _category(name: str, where: str) -> str:
    if name not in CATEGORIES:
        raise UserError(f"{where}: `category` must be one of {', '.join(CATEGORIES)}, got {shown(name)}.")
    return name


def _caption(row: DataRow) -> str:
    """A caption: one text, or several."""
    caption = row.values.get("caption")
    several = [part for part in (caption if isinstance(caption, list) else [caption]) if isinstance(part, str)]
    if not any(several) or (isinstance(caption, list) and len(several) < len(caption)):
        raise UserError(f"{row.where}: `caption` must be a text or a list of texts, got {shown(caption)}.")
    return "\n".join(several)
