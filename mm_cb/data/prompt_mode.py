"""BFCL's prompt mode: functions and a request as one text, for models whose chat template takes no tools."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from mm_cb.core.paths import protocol_file
from mm_cb.core.records import JsonObject

_PLACES = re.compile(r"\{(?:functions|question)\}")


def prompt_mode(functions: Sequence[JsonObject], question: str, version: int = 4) -> str:
    """The request, BFCL's system text first.

    Args:
        functions: Definitions: name, description, parameters.
        question: What the user asks.
        version: BFCL's, 1 or 4.
    """
    protocol, named = _protocol(), f"v{version}"
    hint = protocol["hints"][named]
    if version == 1:
        written, question = str(list(functions)), question + hint
    else:
        hinted = [{**one, "description": f"{one.get('description', '')}{hint}"} for one in functions]
        written = json.dumps(hinted, indent=4)
    filled = {"{functions}": written, "{question}": question}
    return _PLACES.sub(lambda place: filled[place[0]], protocol["prompts"][named])


@cache
def _protocol() -> JsonObject:
    found: JsonObject = protocol_file("bfcl")
    return found
