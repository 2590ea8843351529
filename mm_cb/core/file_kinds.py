"""The formats of records that commands read, told by their keys: a file of one is never read as one of another."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mm_cb.core.errors import UserError


class FileKind(NamedTuple):
    """One format of records."""

    name: str
    keys: Collection[str]
    """What every record has."""
    reader: str
    """Who reads it."""
    without: Collection[str] = ()
    """What no record has."""


ITEMS, BEHAVIORS, BENIGN, HARMFUL_CALLS = "items of a run", "behaviours", "benign requests", "harmful calls"
ANSWERS, CALLS, CALL_ANSWERS, RIGHT_CALLS = "stored answers", "BFCL questions", "BFCL answers", "BFCL's right calls"
POPE, REVIEWS, TRAINING, PROMPTS = "POPE questions", "LLaVA-Wild reviews", "training rows", "imported prompts"
CORPUS = "texts of a corpus"

_ANSWERED = ("completion", "answer", "result", "response")
"""What holds one of these beside the keys of a question is an answer to it."""
_RUN = "`mm-cb report` and `mm-cb judge`, by the folder of the run"
KINDS = (
    FileKind(ITEMS, ("id", "metric", "subject", "condition"), _RUN),
    FileKind("completions of a run", ("key", "completion"), _RUN),
    FileKind("judgements of a run", ("key", "outcome"), _RUN),
    FileKind("judgements of a run", ("key", "content"), _RUN),
    FileKind(
        HARMFUL_CALLS,
        ("id", "kind", "prompt"),
        "`mm-cb eval harmful-calls --data`",
        ("target", "target_call", *_ANSWERED),
    ),
    FileKind(BEHAVIORS, ("id", "prompt", "target"), "`mm-cb attack --behaviors`", _ANSWERED),
    FileKind(BEHAVIORS, ("id", "prompt", "target_call"), "`mm-cb attack --behaviors`", _ANSWERED),
    FileKind(CALLS, ("id", "question", "function"), "`mm-cb eval function-calling --data`", _ANSWERED),
    FileKind(RIGHT_CALLS, ("id", "ground_truth"), "`mm-cb eval function-calling`, in the folder `possible_answer`"),
    FileKind(CALL_ANSWERS, ("id", "result"), "`mm-cb score function-calling --answers`"),
    FileKind(REVIEWS, ("question_id", "tuple"), "`mm-cb score llava-wild --reviews`"),
    FileKind(POPE, ("question_id", "image", "text", "label"), "`mm-cb eval pope --data`", ("answer",)),
    FileKind(POPE, ("question_id", "question", "answer", "image"), "`mm-cb eval pope --data`"),
    FileKind(PROMPTS, ("id", "messages", "source"), "`mm-cb attack --attack imported --prompts`", ("set", "images")),
    FileKind(TRAINING, ("messages",), "`mm-cb train` and `mm-cb data check`", _ANSWERED),
    FileKind(TRAINING, ("conversations",), "`mm-cb train` and `mm-cb data check`", _ANSWERED),
    FileKind(ANSWERS, ("id", "completion"), "`mm-cb score --answers`", ("prompt",)),
    FileKind(BENIGN, ("id", "prompt"), "`mm-cb eval over-refusal --data`", (*_ANSWERED, "output", "text")),
)
_KEYS = {key for kind in KINDS for key in (*kind.keys, *_ANSWERED)} | {"goal", "behavior", "category"}
"""What a column of a table of records may be called."""


def kind_of(record: Mapping[str, Any]) -> FileKind | None:
    """The format that a record's keys tell; None where they tell none."""
    fits = (k for k in KINDS if all(key in record for key in k.keys) and not any(key in record for key in k.without))
    return next(fits, None)


def refuse_others(record: Mapping[str, Any], own: Collection[str], where: str, *, alike: Collection[str] = ()) -> None:
    """Refuse a record of another format.

    Args:
        record: What stands there.
        own: Names of the formats that are read here.
        where: What an error calls it: file and line.
        alike: Formats that a record of one's own looks like where it lacks a key, which its reader then names.

    Raises:
        UserError: Naming the format, and who reads it.
    """
    kind = kind_of(record)
    if kind is not None and kind.name not in (*own, *alike):
        raise UserError(
            f"{where} is a record of another format, {kind.name}, read by {kind.reader}; here go {' or '.join(own)}."
        )


def refuse_items(record: Mapping[str, Any], own: str, where: str) -> None:
    """Refuse an item of a run, whose picture an attack has changed, where records may have keys of their own.

    Raises:
        UserError: As `refuse_others`.
    """
    if (kind := kind_of(record)) is not None and kind.name == ITEMS:
        refuse_others(record, (own,), where)


def refuse_records(text: str, where: str, what: str, *, by_line: bool = True) -> None:
    """Refuse records where plain text is expected.

    Args:
        text: The content of a file.
        where: The file.
        what: What it should hold.
        by_line: Whether each line stands for itself; a whole text may be a JSON object that is no record.

    Raises:
        UserError: If its first line is a record of a known format or the header of a table, every line is a JSON
            object, the whole is JSON, or the file's name says that it is a table.
    """
    whole = _parsed(text)
    lines = [line for line in text.split("\n") if line.strip()]
    records = [record for line in lines[:2] if isinstance(record := _parsed(line), dict)]
    kind = kind_of(records[0]) if records else None
    if where.lower().endswith((".csv", ".tsv")) or (lines and _is_header(lines[0])):
        raise UserError(f"`{where}` must hold {what} as plain text, it holds a table; give that column alone.")
    if len(lines) > 1 and (isinstance(whole, list) or (isinstance(whole, dict) and (by_line or kind_of(whole)))):
        raise UserError(f"`{where}` must hold {what} as plain text, it holds JSON.")
    if kind is not None or (len(records) == 2 and all(isinstance(_parsed(line), dict) for line in lines)):
        told = f"{kind.name}, read by {kind.reader}" if kind else "JSON lines"
        raise UserError(f"`{where}` must hold {what} as plain text, it holds {told}.")


def _is_header(line: str) -> bool:
    """Whether a line names columns, one of which is a key of a known format."""
    for separator in ",;\t|":
        fields = [field.strip().strip('"').lower() for field in line.split(separator)]
        if len(fields) > 1 and all(field.isidentifier() for field in fields) and _KEYS & {*fields}:
            return True
    return False


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
