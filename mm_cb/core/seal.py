"""Seals: a record that says of itself whether it is as it was written.

They hold against accidents: an editor's slip, a line of another run, half of a merge. Whoever means to deceive can
compute the seal too.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.records import JsonObject

SEAL = "seal"


def seal_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's other content, in hex, whatever the order of its keys."""
    plain = json.loads(dumps({key: value for key, value in record.items() if key != SEAL}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> JsonObject:
    """The record with its seal, to be written."""
    return {**record, SEAL: seal_of(record)}


def refuse_changed(record: Mapping[str, Any], where: str, *, needed: bool) -> None:
    """Refuse a record whose content is not what was sealed.

    Args:
        record: What was read.
        where: Its file, for the error line.
        needed: Whether it must have a seal: those of earlier versions have none.

    Raises:
        UserError: Naming the file.
    """
    if SEAL not in record and not needed:
        return
    if record.get(SEAL) != seal_of(record):
        raise changed(where)


def changed(where: str) -> UserError:
    """The error for a file that is not as it was written."""
    return UserError(
        f"{where} was changed after it was written; put the file back as it was, or repeat the step that writes it."
    )
