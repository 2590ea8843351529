"""Requests without an answer: refused by a server, impossible to send, or cut before it began: nothing was said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_cb.core.chat_replies import CUT, REFUSED, UNANSWERED
from mm_cb.core.checked import read_records
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.records import Completion


def unanswered(store: Path) -> dict[str, tuple[str, str]]:
    """The requests of a store of completions that have none: key → kind (``refused`` or ``cut``) and reason."""
    records: Sequence[Mapping[str, object]] = read_records(store, Completion)
    return {str(r["key"]): (kind, str(r[kind])) for r in records for kind in UNANSWERED if kind in r}


def unanswered_note(store: Path) -> str | None:
    """What to print about them, if there are any."""
    lost = list(unanswered(store).values())
    parts = []
    for kind, words in (
        (REFUSED, "refused"),
        (CUT, "cut before their answer began (`--max-new-tokens` gives more room)"),
    ):
        reasons = [reason for one, reason in lost if one == kind]
        if reasons:
            parts.append(f"{len(reasons)} {words}, the first: {reasons[0].rstrip('.')}")
    return f"CAUTION {len(lost)} requests have no answer: {'; '.join(parts)}." if lost else None


_ERROR_TEXT = re.compile(
    r"\s*(?:error during inference\b|error code: [45]\d\d\b|(?:http )?error [45]\d\d\b|traceback \(most recent)", re.I
)


def is_error_text(answer: str) -> bool:
    """Whether a stored answer is what the program that asked wrote in its place when asking failed."""
    return _ERROR_TEXT.match(answer) is not None


def error_texts(answers: Mapping[str, str]) -> tuple[list[str], str]:
    """The questions whose stored answer is an error text, and what to print about them.

    Raises:
        UserError: If all are.
    """
    lost = [id for id, answer in answers.items() if is_error_text(answer)]
    if not lost:
        return [], ""
    told = f"{len(lost)} of {len(answers)} stored answers are error texts and no model's, the first to `{lost[0]:.80}`"
    told += f" ({one_line(answers[lost[0]]):.80})"
    if len(lost) == len(answers):
        raise UserError(f"{told}: ask those questions again.")
    return lost, f"CAUTION {told}: they have no score; ask those questions again."


def go_on(store: Path, requests: int, max_new_tokens: int) -> str:
    """What is kept of an interrupted run and what to do; without one answer, what was cut is forgotten.

    A corrected server is then asked again for all of them.
    """
    lost = unanswered(store)
    there = len(read_records(store, Completion)) - len(lost)
    if not there:
        store.unlink(missing_ok=True)
    room = ""
    if any(kind == CUT for kind, _ in lost.values()):
        room = f", or give `--max-new-tokens` more than {max_new_tokens}" + (" and another `--out`" if there else "")
    return (
        f"{there} of {requests} answers are there and kept: mend the cause, then run the same command again to go on"
        f"{room}."
    )
