"""Behaviours whose target is a call, with the call as the model under attack would write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
        UserError: If there are such targets and the model's template takes no tools, or a line holds another target.
    """
    if all(one.call is None for one in behaviors):
        return list(behaviors)
    from mm_cb.models.families import load_processor, read_config
    from mm_cb.models.tools import tool_format

    try:
        format = tool_format(load_processor(model, read_config(model)))
    except UserError as error:
        raise UserError(f"`target_call` needs a model that writes calls: {error}") from error
    written = []
    for one in behaviors:
        if one.call is not None:
            target, opening = format.write([one.call.call]), format.opening(one.call.call.name)
            if one.target not in ("", target):
                raise UserError(
                    f"behaviour {one.id!r} must have `target_call` or `target`, it has both, and `{model}` writes the "
                    f"call as {target[:120]!r}; leave `target` out."
                )
            one = replace(one, target=target, extra={**one.extra, OPENING: opening})
        written.append(one)
    return written


def kept_lines(file: Path, behaviors: Sequence[Behavior]) -> bytes:
    """A behaviours file's bytes, with the targets that were written from calls: what a run keeps.

    Args:
        file: The file.
        behaviors: What `spoken` made of its lines.
    """
    if all(one.call is None for one in behaviors):
        return file.read_bytes()
    added = {one.id: {"target": one.target, OPENING: one.opening} for one in behaviors if one.call is not None}
    lines = [line.values for line in json_lines(file, "behaviours")]
    return "".join(dumps(line | added.get(str(line["id"]), {})) + "\n" for line in lines).encode()
