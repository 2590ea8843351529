"""MMMU's questions, from the hub or from a local copy of it, checked before anything is asked, and how they are put."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_cb.benchmarks import base
from mm_cb.benchmarks.mmmu.benchmark import MmmuSettings
from mm_cb.benchmarks.mmmu.protocol import MULTIPLE_CHOICE, chosen_subjects, protocol, subject_of
from mm_cb.benchmarks.mmmu.score import Response, RightAnswer, answer_from, question_type
from mm_cb.benchmarks.pictures import stored_picture
from mm_cb.benchmarks.rows import parquet_rows, undecoded
from mm_cb.core import hub
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.folding import is_blank
from mm_cb.core.paths import refuse_missing_parts
from mm_cb.core.records import JsonObject
from mm_cb.data.pictures import EncodedPicture

_SLOTS = tuple(f"image_{number}" for number in range(1, 8))
_MARKER = re.compile(r"<image (\d+)>")
_COLUMNS = ("id", "question", "options", "answer", "question_type", _SLOTS[0])


@dataclass(frozen=True)
class MmmuQuestion:
    """One row of the data set."""

    id: str
    text: str
    question_type: str
    options: tuple[str, ...]
    answer: RightAnswer
    pictures: Mapping[int, EncodedPicture]
    """By number, 1 to 7; unused ones are absent."""

    @property
    def letters(self) -> tuple[str, ...]:
        """A, B, ... for the options; none for an open question."""
        return tuple(chr(ord("A") + place) for place in range(len(self.options)))

    def answered(self, response: str) -> Response:
        """The question with what a model said to it."""
        options = dict(zip(self.letters, self.options, strict=True))
        return Response(self.id, self.question_type, self.answer, response, self.letters, options)


def read_questions(source: str, settings: MmmuSettings) -> list[MmmuQuestion]:
    """The questions of the chosen subjects, in official order.

    Args:
        source: Hub id, or a folder with one folder per subject: Parquet files as on the hub, or ``save_to_disk``. From
            the hub come the files of these subjects and this split alone.
        settings: Subjects, split and limit.

    Raises:
        UserError: If a subject or the split is missing, a row is not as MMMU's are, or a picture is broken or huge.
    """
    subjects = chosen_subjects(settings.subjects)
    folder = Path(source)
    if not folder.is_dir():
        folders = subjects if settings.subjects else ["*"]
        wanted = [f"{name}/{settings.split}-*.parquet" for name in folders]
        folder = hub.fetch(source, wanted, kind="dataset", bars=True)
    if missing := [name for name in subjects if not (folder / name).is_dir()]:
        raise UserError(
            f"`{source}` must hold a folder per MMMU subject, {', '.join(missing[:5])} ({len(missing)} in all) missing;"
            " complete the copy or name the subjects to ask: --subjects Art,Music."
        )
    questions = []
    for subject in subjects:
        rows = _rows(folder / subject, settings.split)
        if not rows:
            raise UserError(
                f"`{folder / subject}` must hold at least one question of split {settings.split}, it holds none; fetch "
                "it again."
            )
        questions += [
            _question(row, subject, settings.split, f"{source}, {subject}, row {place}")
            for place, row in enumerate(rows[: settings.limit], start=1)
        ]
    id, times = Counter(question.id for question in questions).most_common(1)[0] if questions else ("", 1)
    if times > 1:
        raise UserError(f"`{source}` must hold every question once, `{id}` comes {times} times; correct the copy.")
    return questions


def as_asked(question: MmmuQuestion, prompt: str, pictures: str) -> base.Question:
    """The question as it is put; markers such as ``<image 2>`` stay in the text, the pictures stand in front of it.

    Args:
        question: What to ask.
        prompt: ``official`` or ``lmms_eval``.
        pictures: ``named`` or ``first``.

    Raises:
        UserError: If a picture that is to be shown is missing.

    Source:
        ``construct_prompt`` of MMMU-Benchmark/MMMU and of lmms-eval. Deviation: with several pictures the model's own
        chat template joins their places, where lmms-eval puts blanks between them.
    """
    named = {int(number) for text in (question.text, *question.options) for number in _MARKER.findall(text)}
    numbers = sorted(named) if pictures == "named" and named else [1]
    if missing := [number for number in numbers if number not in question.pictures]:
        raise UserError(
            f"MMMU question `{question.id}` must have `image_{missing[0]}`, which is to be shown; it is missing."
        )
    shown = tuple(question.pictures[number] for number in numbers)
    return base.Question(question.id, prompt_text(question, prompt), shown)


def prompt_text(question: MmmuQuestion, prompt: str) -> str:
    """The user's text."""
    form = protocol().prompts[prompt]
    if not question.options:
        return form["open"].format(question=question.text, instruction=protocol().instructions["open"])
    pairs = zip(question.letters, question.options, strict=True)
    return form["multiple_choice"].format(
        question=question.text,
        options="\n".join(form["option"].format(letter=letter, text=text) for letter, text in pairs),
        instruction=protocol().instructions["multiple_choice"],
    )


def fingerprint(questions: Sequence[MmmuQuestion]) -> str:
    """SHA-256 over everything that is asked: a run belongs to it, wherever the questions came from."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(repr((q.id, q.text, q.question_type, q.options, q.answer)).encode("utf-8", "backslashreplace"))
        for number, picture in q.pictures.items():
            assert isinstance(picture.source, bytes)
            digest.update(b"%d" % number + picture.source)
    return digest.hexdigest()


def _rows(folder: Path, split: str) -> list[JsonObject]:
    """The rows of one subject's folder."""
    try:
        if files := sorted([*folder.glob(f"{split}-*.parquet"), *folder.glob(f"{split}.parquet")]):
            refuse_missing_parts(files)
            return [row.values for row in parquet_rows(files)]
        for saved in (folder / split, folder):
            if (saved / "state.json").is_file():
                from datasets import load_from_disk

                return undecoded(load_from_disk(str(saved)))
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"`{folder}` cannot be read: {one_line(str(e))[:200]}.") from e
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise UserError(f"`{folder}` must hold split {split} as {split}-*.parquet or a saved data set, got {there}.")


def _question(row: JsonObject, subject: str, split: str, where: str) -> MmmuQuestion:
    """Check one row."""
    if lacking := [name for name in _COLUMNS if name not in row]:
        raise UserError(f"{where} must have MMMU's columns, it lacks {', '.join(lacking)}.")
    texts = ("id", "question", "question_type", "answer")
    if wrong := [name for name in texts if not isinstance(row[name], str)]:
        raise UserError(f"{where} must hold texts in {', '.join(texts)}; {', '.join(wrong)} hold none.")
    where = f"{where} (`{row['id'][:80]}`)"
    if is_blank(row["question"]):
        raise UserError(f"{where} must have a `question`, it is blank.")
    if subject_of(row["id"]) != subject or not row["id"].startswith(f"{split}_"):
        raise UserError(f"{where} must belong to split {split} of {subject}; give that split, or correct the copy.")
    options: tuple[str, ...] = ()
    answer: Any = row["answer"]
    kind = question_type(row["question_type"], where)
    if kind == MULTIPLE_CHOICE:
        options = _literal_list(row["options"], f"{where}: `options`")
    elif answer.startswith("["):
        answer = list(_literal_list(answer, f"{where}: `answer`"))
    # MMMU's loaders, official and lmms-eval's, turn pictures upright (as `datasets` does) and then call convert("RGB")
    pictures = {
        number: stored_picture(row[slot], f"{where}: `{slot}`", drop_alpha=True)
        for number, slot in enumerate(_SLOTS, start=1)
        if row.get(slot) is not None
    }
    question = MmmuQuestion(row["id"], row["question"], kind, options, answer_from(answer, where), pictures)
    if options and answer not in question.letters:
        raise UserError(f"{where}: `answer` must be one of {', '.join(question.letters)}, got {answer!r}.")
    return question


def _literal_list(text: Any, where: str) -> tuple[str, ...]:
    """The texts in a Python list inside a text, as MMMU stores options and several answers."""
    try:
        value = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = None
    if not isinstance(value, list) or not 1 <= len(value) <= 26 or not all(isinstance(one, str) for one in value):
        raise UserError(f"{where} must be a literal list of texts inside a text, got {str(text)[:80]!r}.")
    return tuple(value)
