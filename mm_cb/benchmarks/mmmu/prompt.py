"""What is asked: MMMU's text as the official code or the reference harness writes it, and the pictures to it."""

from __future__ import annotations

import re

from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.benchmarks.mmmu.questions import Question, StoredPicture
from mm_cb.core.errors import UserError
from mm_cb.inference.generation import Request

_MARKER = re.compile(r"<image (\d+)>")


def request(question: Question, prompt: str, pictures: str) -> Request:
    """The question as a request; markers such as ``<image 2>`` stay in the text, the pictures stand in front of it.

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
    return Request(question.id, prompt_text(question, prompt), _shown(question, pictures))


def prompt_text(question: Question, prompt: str) -> str:
    """The user's text."""
    form = protocol().prompts[prompt]
    if not question.options:
        return form["open"].format(question=question.text, instruction=protocol().instructions["open"])
    options = (
        form["option"].format(letter=letter, text=text)
        for letter, text in zip(question.letters, question.options, strict=True)
    )
    return form["multiple_choice"].format(
        question=question.text,
        options="\n".join(options),
        instruction=protocol().instructions["multiple_choice"],
    )


def _shown(question: Question, pictures: str) -> tuple[StoredPicture, ...]:
    named = {int(number) for text in (question.text, *question.options) for number in _MARKER.findall(text)}
    numbers = sorted(named) if pictures == "named" and named else [1]
    missing = [number for number in numbers if number not in question.pictures]
    if missing:
        raise UserError(
            f"MMMU question `{question.id}` must have `image_{missing[0]}`, which is to be shown; it is missing."
        )
    return tuple(question.pictures[number] for number in numbers)
