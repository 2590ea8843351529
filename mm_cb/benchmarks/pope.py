"""POPE: yes or no, is this object in the picture? How often a model sees what is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from mm_cb.benchmarks.base import Benchmark, Question, Score
from mm_cb.benchmarks.settings import AskSettings, StoredAnswers, setting
from mm_cb.core.errors import UserError
from mm_cb.core.reading import shown
from mm_cb.metrics.table import DETAIL, Metric

if TYPE_CHECKING:
    from mm_cb.benchmarks.rows import DataRow

KINDS = ("random", "popular", "adversarial")
"""How the absent objects were chosen."""
COUNTS = ("tp", "fp", "tn", "fn")
_IDS = ("id", "questionid", "qid", "uid", "docid", "itemid", "sampleid", "queryid")
"""Keys that say which question an answer is to, in lower case and of letters alone."""


@dataclass(frozen=True)
class PopeSettings(AskSettings):
    """How POPE is asked."""

    images: str = setting(
        "", "Folder of the pictures.  [default: images beside the file, or its folder]", metavar="DIR"
    )
    suffix: str = setting("", "Text behind every question, such as a request for one word.", metavar="TEXT")


@dataclass(frozen=True)
class PopeAnswers(StoredAnswers):
    """Answers as the original's evaluator takes them."""

    answers: str = setting("", "JSON lines with `answer` (or `text`), in the order of the questions.", metavar="FILE")


def official_answer(text: str) -> str:
    """``no`` if No, not or no is a word of the first sentence, else ``yes``: silence and noise are a yes.

    Source:
        AoiDragon/POPE, ``evaluate.py``: cut at the first full stop, commas removed, split at single blanks, case as it
        is. Deviation: none.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def strict_answer(text: str) -> str | None:
    """The official answer where the model said it: a yes needs the word, and blindly drawn characters say nothing."""
    from mm_cb.metrics.degenerate import is_noise

    answer = official_answer(text)
    said = answer == "no" or "yes" in re.findall(r"\w+", text.partition(".")[0].lower())
    return answer if said and not is_noise(text) else None


def _refuse_another(row: DataRow, question: Question) -> None:
    """Refuse an answer whose own words for its question, an id or a picture, are another question's."""
    for key, value in row.values.items():
        if re.sub("[^a-z]", "", key.lower()) in _IDS and str(value) not in (question.id, *question.id.split("/")[1:]):
            raise UserError(
                f"{row.where} has the `{key}` {shown(value)} where question `{question.id}` stands: give the answers "
                "to these questions, in their order."
            )
    source = getattr(question.pictures[0], "source", None) if question.pictures else None
    image = row.values.get("image")
    if isinstance(source, Path) and isinstance(image, str) and PurePath(image).name != source.name:
        raise UserError(
            f"{row.where} is about the picture {shown(image)}, but that of question `{question.id}` is "
            f"`{source.name}`; give the answers to these questions, in their order."
        )


def _score(label: str, answer: str | None) -> Score:
    hit = {("yes", "yes"): "tp", ("no", "yes"): "fp", ("no", "no"): "tn", ("yes", "no"): "fn", ("yes", None): "fn"}
    place = hit.get((label, answer))
    counts = {**{name: int(name == place) for name in COUNTS}, "fallback": int(answer is None)}
    return Score(float(answer == label), answer, counts=counts)


def _part(name: str, label: str, rule: str, statistic: Any, **more: Any) -> Metric:
    part = {"part_of": "pope", "columns": COUNTS, "statistic": statistic, "seeded": False, "shipped": True}
    return Metric(f"pope_{name}", f"POPE {label}", rule, **{"section": DETAIL, **part, **more})


class Pope(Benchmark):
    """POPE."""

    name = "pope"
    title = "POPE"
    about = "objects that are or are not in the picture, yes or no: accuracy, precision, recall, F1, share of yes"
    needs = "the questions with their pictures, lmms-lab/POPE on the hub or the original's files and COCO's pictures"
    metrics = (
        Metric("pope", "POPE accuracy", "share of right answers", seeded=False, shipped=True),
        _part(
            "f1", "F1", "2 tp / (2 tp + fp + fn)", lambda tp, fp, tn, fn: 2 * tp / (2 * tp + fp + fn), section="kept"
        ),
        _part("precision", "precision", "tp / (tp + fp)", lambda tp, fp, tn, fn: tp / (tp + fp)),
        _part("recall", "recall", "tp / (tp + fn)", lambda tp, fp, tn, fn: tp / (tp + fn)),
        _part("yes", "share of yes", "answers yes", lambda tp, fp, tn, fn: tp + fp, higher_is_better=None),
    )
    settings = PopeSettings
    stored = PopeAnswers
    dataset = "lmms-lab/POPE"
    data_help = "Hub id with lmms-lab/POPE's columns, a folder of Parquet, or the original's file or folder of files."
    example = "--data data/examples/pope.jsonl --images data/examples/pictures"

    def questions(self, data: str, settings: PopeSettings) -> Sequence[Question]:
        """The original's lines (question_id, image, text, label), or the hub's columns (question, answer, category)."""
        from mm_cb.benchmarks.pictures import picture_inside, stored_picture
        from mm_cb.benchmarks.rows import read_rows, texts
        from mm_cb.core.file_kinds import POPE, refuse_others

        found = []
        for row in read_rows(data, "test"):
            refuse_others(row.values, (POPE,), row.where)
            hub = "question" in row.values
            number, text, label = texts(row, ("question_id", *(("question", "answer") if hub else ("text", "label"))))
            label = label.strip().lower()
            if label not in ("yes", "no"):
                raise UserError(f"{row.where}: the right answer must be yes or no, got {label[:40]!r}.")
            kind = str(row.values.get("category") or (row.file.stem.rpartition("_")[2] if row.file else ""))
            image = row.values.get("image")
            if isinstance(image, Mapping) or row.file is None:
                if settings.images:
                    raise UserError(f"{row.where} holds its picture itself: leave `--images` out.")
                picture: Any = stored_picture(image, f"{row.where}: `image`")
            else:
                beside = row.file.parent / "images"
                folder = Path(settings.images) if settings.images else beside if beside.is_dir() else beside.parent
                picture = picture_inside(folder, image, row.where, links=bool(settings.images))
            kind = kind if kind in KINDS else "all"
            id = number if kind == "all" else f"{kind}/{number}"
            found.append(Question(id, text + settings.suffix, (picture,), label, kind))
        return found

    def score(self, question: Question, completion: str) -> Mapping[str, Score]:
        """Officially, and without what silence and noise earn."""
        label = question.reference
        return {
            "official": _score(label, official_answer(completion)),
            "strict": _score(label, strict_answer(completion)),
        }

    def stored_answers(self, stored: PopeAnswers, questions: Sequence[Question]) -> dict[str, str]:
        """In the order of the questions, as the original wants them; a line that names another question is refused."""
        from mm_cb.benchmarks.rows import json_lines
        from mm_cb.core.file_kinds import ANSWERS

        rows = list(json_lines(Path(stored.answers), (ANSWERS,)))
        if len(rows) != len(questions):
            raise UserError(f"`{stored.answers}` must hold {len(questions)} answers, one a question, got {len(rows)}.")
        answers = {}
        for row, question in zip(rows, questions, strict=True):
            asked = row.values.get("question", row.values.get("prompt", question.prompt))
            plain = [" ".join(str(text).split()).lower() for text in (asked, question.prompt)]  # files differ in these
            if not plain[0].startswith(plain[1]):
                raise UserError(
                    f"{row.where} answers {shown(asked)}, but question `{question.id}` is {shown(question.prompt)}; "
                    "give the answers to these questions, in their order."
                )
            said = [row.values[key] for key in ("answer", "text") if key in row.values]
            if len(said) > 1 and said[0] != said[1] and " ".join(str(said[1]).split()).lower() != plain[1]:
                raise UserError(f"{row.where}: `answer` and `text` must be one text, they differ; keep one.")
            answer = said[0] if said else None
            _refuse_another(row, question)
            if not isinstance(answer, str):
                raise UserError(f"{row.where} must be the answer to question `{question.id}`, as a text.")
            answers[question.id] = answer
        return answers
