"""Answers that were stored before: outputs in the official layout, or predictions and an answer file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.mmmu.parse import parse_open, right_letter, right_open
from mm_cb.benchmarks.mmmu.protocol import MULTIPLE_CHOICE, chosen_subjects, protocol, subject_of
from mm_cb.benchmarks.mmmu.score import Response, ScoredResponse, answer_from, question_type, response_from
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import refuse_others
from mm_cb.core.reading import json_file, shown
from mm_cb.core.records import JsonObject
from mm_cb.core.thoughts import answer_in

_NAMED = 5


def response_files(folder: Path, subjects: Sequence[str]) -> list[Path]:
    """``<folder>/<Subject>/output.json`` of the subjects, in official order; none named means all 30.

    Raises:
        UserError: If one is not there.
    """
    wanted = {subject: Path(folder) / subject / "output.json" for subject in chosen_subjects(subjects)}
    missing = [subject for subject, file in wanted.items() if not file.is_file()]
    if missing:
        there = [subject for subject in wanted if subject not in missing]
        hint = f"; to score what is there: --subjects {','.join(there)}" if there and not subjects else ""
        raise UserError(
            f"`{folder}` must hold <Subject>/output.json for {len(wanted)} MMMU subjects, {_listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing{hint}."
        )
    return list(wanted.values())


def read_responses(files: Sequence[Path]) -> list[Response]:
    """The responses in files of the official layout, each file named after its subject's folder.

    Raises:
        UserError: If a file or a record is broken, belongs to another subject, or the files mix splits.
    """
    responses = []
    for file in files:
        records = json_file(file, list, "a list of records", nul=True)
        if not records:
            raise UserError(f"`{file}` must hold at least one record, it is empty.")
        first: dict[str, int] = {}
        for place, record in enumerate(records):
            where = f"{file}, record {place}"
            if not isinstance(record, dict):
                raise UserError(f"{where} must be a JSON object, got {type(record).__name__}.")
            refuse_others(record, ("MMMU outputs",), where)
            response = response_from(record, where)
            if response.subject != file.parent.name:
                raise UserError(f"{where} must belong to subject {file.parent.name}, got `{response.id}`.")
            if first.setdefault(response.id, place) != place:
                raise UserError(
                    f"{where}: question `{response.id}` comes again, first at record {first[response.id]}; keep one of "
                    "the two."
                )
            responses.append(replace(response, response=answer_in(response.response)))
    refuse_mixed_splits([response.id for response in responses])
    return responses


def read_predictions(predictions: Path, answers: Path, subjects: Sequence[str]) -> list[ScoredResponse]:
    """Score answers that were parsed before against an official answer file, in the predictions' order by subject.

    Letters are taken as they are, whether read or drawn, so there is no strict score; open answers are parsed again, as
    the official evaluator does.

    Args:
        predictions: JSON, id -> letter or open answer.
        answers: JSON, id -> ``question_type`` and ``ground_truth``.
        subjects: Those to score; none named means all that the answer file holds.

    Raises:
        UserError: If a file is broken, or the two do not hold the same questions.

    Source:
        MMMU-Benchmark/MMMU, ``mmmu/main_eval_only.py``. Deviation: a question without prediction is an error, not left
        out.
    """
    given: JsonObject = json_file(predictions, dict, "an object, id to answer", nul=True)
    known: JsonObject = json_file(answers, dict, "an object, id to question_type and ground_truth")
    if subjects:
        wanted = chosen_subjects(subjects)
        given = {id: value for id, value in given.items() if subject_of(id) in wanted}
        known = {id: value for id, value in known.items() if subject_of(id) in wanted}
    if strange := [id for id in given if id not in known]:
        raise UserError(
            f"`{predictions}` must hold questions of `{answers}`, but {_listed(strange)} {_are(strange)} not in it; "
            "give the answer file of the same split and version."
        )
    if absent := [id for id in known if id not in given]:
        raise UserError(
            f"`{predictions}` must answer every question of `{answers}`, but {_listed(absent)} {_are(absent)} missing; "
            "give the answer file of the same split and version, or name the subjects to score: --subjects Art,Music."
        )
    if not given:
        raise UserError(f"`{predictions}` must hold at least one answer, it holds none.")
    refuse_mixed_splits(given)
    order = {subject: place for place, subject in enumerate(protocol().subjects)}
    scored = [_score(id, given[id], known[id], predictions, answers) for id in given]
    return sorted(scored, key=lambda one: order[one.response.subject])


def _score(id: str, prediction: Any, known: Any, predictions: Path, answers: Path) -> ScoredResponse:
    where = f"{answers} (`{id[:80]}`)"
    if not isinstance(known, dict) or not isinstance(known.get("question_type"), str):
        raise UserError(f"{where} must hold `question_type` and `ground_truth`, got {shown(known)}.")
    if not isinstance(prediction, str):
        raise UserError(f"{predictions} (`{id[:80]}`) must be a text, got {shown(prediction)}.")
    kind = question_type(known["question_type"], where)
    response = Response(id, kind, answer_from(known.get("ground_truth"), where), prediction)
    if response.question_type == MULTIPLE_CHOICE:
        return ScoredResponse(response, prediction, prediction, right_letter(response.answer, prediction), None)
    pieces = tuple(parse_open(prediction))
    return ScoredResponse(response, pieces, None, right_open(response.answer, pieces), None)


def refuse_mixed_splits(ids: Sequence[str] | JsonObject) -> None:
    """Refuse ids of more than one split, which no published number is made of.

    Raises:
        UserError: If there are several.
    """
    splits = sorted({id.partition("_")[0] for id in ids})
    if len(splits) > 1:
        raise UserError(f"the questions must be of one split, got {', '.join(splits)}; score each by itself.")


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(f"`{name[:80]}`" for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
