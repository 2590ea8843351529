"""Behaviours whose target is a call, with the call as the model under attack would write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mm_cb.core.calls import Call, CallFormat
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.reading import json_lines
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.target_calls import OPENING


def spoken(behaviors: Sequence[Behavior], model: str) -> list[Behavior]:
    """The behaviours, each target that is a call written by the chat template's way of writing calls.

    Args:
        behaviors: As their file has them.
        model: Hub id, folder, or an embedded model's name.

    Raises:
        UserError: If there are such targets and the model's template takes no tools, some lines have a text, or a line
            has both.
    """
    if all(one.call is None for one in behaviors):
        return list(behaviors)
    if texts := [one.id for one in behaviors if one.call is None]:
        raise UserError(
            f"all behaviours must have `target_call`, or none: success is judged in two ways. `{texts[0]}` and "
            f"{len(texts) - 1} more of {len(behaviors)} have a text; put them into a file of their own."
        )
    from mm_cb.models.families import load_processor, read_config
    from mm_cb.models.tools import tool_format

    try:
        format = tool_format(load_processor(model, read_config(model)))
    except UserError as error:
        raise UserError(f"`target_call` needs a model that writes calls: {error}") from error
    return [_written(one, one.call.call, format, model) for one in behaviors if one.call is not None]


def _written(behavior: Behavior, call: Call, format: CallFormat, model: str) -> Behavior:
    target, opening = format.write([call]), format.opening(call.name)
    if behavior.target not in ("", target):
        raise UserError(
            f"{behavior.named} must have `target_call` or `target`, it has both, and `{model}` writes the "
            f"call as {target[:120]!r}; leave `target` out."
        )
    return replace(behavior, target=target, extra={**behavior.extra, OPENING: opening})


def kept_lines(file: Path, behaviors: Sequence[Behavior], *, spoken: bool = True) -> bytes:
    """The lines of a file that are about the behaviours that are asked, what a run keeps: its bytes where all are.

    Args:
        file: Of behaviours, or of prompts for them.
        behaviors: Those that are asked, as `spoken` made them.
        spoken: Whether targets that were written from calls go into their lines.
    """
    added = {
        one.id: {"target": one.target, OPENING: one.opening} if spoken and one.call is not None else {}
        for one in behaviors
    }
    lines = [line.values for line in json_lines(file, "lines")]
    if not any(added.values()) and all(line["id"] in added for line in lines):
        return file.read_bytes()
    return "".join(dumps(line | added[line["id"]]) + "\n" for line in lines if line["id"] in added).encode()
