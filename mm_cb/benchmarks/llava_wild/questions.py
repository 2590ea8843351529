"""The 60 questions with their pictures, captions and reference answers, from the original files or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.base import Question
from mm_cb.benchmarks.llava_wild.reviews import CATEGORIES
from mm_cb.benchmarks.pictures import picture_inside, stored_picture
from mm_cb.benchmarks.rows import undecoded
from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.paths import data_path
from mm_cb.core.reading import Line, json_lines, shown
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
    import yaml

    content: JsonObject = yaml.safe_load(data_path("protocols", "llava_wild.yaml").read_text(encoding="utf-8"))
    return content


def read_questions(data: str) -> list[WildQuestion]:
    """The questions of a local copy in the original's layout, or of a data set with the hub's columns.

    Raises:
        UserError: If files, columns or pictures are missing, or a question has no caption or reference answer.
    """
    folder = Path(data)
    original = any((folder / name).is_file() for name in _FILES)
    questions = _from_files(folder) if original else _from_dataset(data)
    for question in questions:
        if question.category not in CATEGORIES:
            raise UserError(
                f"question {question.id}: `category` must be one of {', '.join(CATEGORIES)}, got {question.category!r}."
            )
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
    asked, contexts, answers = (list(json_lines(folder / name, "questions")) for name in _FILES)
    captions, references = _by(contexts, "image", "caption"), _by(answers, "question_id", "text")
    questions = []
    for where, record in asked:
        id, image = record.get("question_id"), record.get("image")
        held = {"context": captions.get(str(image)), "answer": references.get(str(id))}
        lacking = [name for name, value in held.items() if not value]
        if lacking or not isinstance(image, str):
            raise UserError(f"{where}: question {shown(id)} lacks its {', '.join(lacking) or 'image'}.")
        picture = picture_inside(folder, f"images/{image}", f"{where}: question {shown(id)}")
        texts = str(record.get("text")), _caption(held["context"]), str(held["answer"])
        questions.append(WildQuestion(str(id), str(record.get("category")), *texts, picture.checked()))
    return questions


def _by(lines: Sequence[Line], key: str, value: str) -> JsonObject:
    """One column by another, whose entries must differ."""
    found: JsonObject = {}
    for where, record in lines:
        name = str(record.get(key))
        if name in found:
            raise UserError(f"{where}: `{key}` must differ from line to line, {shown(name)} comes more than once.")
        found[name] = record.get(value)
    return found


def _from_dataset(data: str) -> list[WildQuestion]:
    rows: Any = _from_folder(data) if Path(data).is_dir() else hub.load_split(data, "train")
    if missing := [name for name in _COLUMNS if name not in rows.column_names]:
        raise UserError(f"`{data}` must have the columns {', '.join(_COLUMNS)}; it lacks {', '.join(missing)}.")
    return [_from_row(row, f"{data}, row {place}: `image`") for place, row in enumerate(undecoded(rows))]


def _from_folder(data: str) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        return load_dataset(data, split="train")
    except (OSError, ValueError) as e:
        raise UserError(
            f"`--data` must be a folder with {', '.join(_FILES)} and images/, or a data set with the hub's columns; "
            f"`{data}` cannot be loaded: {e}"
        ) from e


def _from_row(row: JsonObject, where: str) -> WildQuestion:
    return WildQuestion(
        id=str(row["question_id"]),
        category=str(row["category"]),
        text=str(row["question"]),
        caption=_caption(row["caption"]),
        reference=str(row["gpt_answer"]),
        picture=stored_picture(row["image"], where),
    )


def _caption(caption: Any) -> str:
    return "\n".join(str(part) for part in caption) if isinstance(caption, list) else str(caption)
