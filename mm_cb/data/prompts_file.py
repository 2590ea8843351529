"""Prompts made elsewhere (by GCG, PAIR, PyRIT, garak, by hand): whole chats, each for a behaviour of another file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_cb.core.errors import UserError
from mm_cb.core.folding import is_blank
from mm_cb.core.reading import BROKEN, REPLACED, Line, json_lines, lost_picture, refuse_typos, shown, unfit
from mm_cb.core.records import Message

_ASKED = ("content", "input", "instruction", "prompt", "question", "query", "system", "system_prompt", "text", "tools")
"""Keys under which other files have what is asked; here only ``messages`` are sent."""
KEPT_AS = "prompts.jsonl"
"""The copy of the file that an attack's run directory keeps."""


@dataclass(frozen=True)
class ImportedPrompt:
    """One line of a prompts file.

    Attributes:
        messages: The chat that is sent, the user's turn last.
        source: Who made it, and on which model.
        sha256: Of the messages, see `messages_hash`.
        where: File and line.
    """

    messages: tuple[Message, ...]
    source: str
    sha256: str
    where: str = field(default="", compare=False, repr=False)


def messages_hash(messages: Collection[Message]) -> str:
    """SHA-256 of messages as JSON with sorted keys, no blanks between, and every character as it is."""
    text = json.dumps(list(messages), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_prompts(path: Path, behaviors: Collection[str]) -> dict[str, list[ImportedPrompt]]:
    """Read a prompts file: behaviour id → its prompts, in the file's order.

    Args:
        path: JSONL, ``{"id": a behaviour's, "messages", "source", "hash": of the messages | null}`` a line.
        behaviors: The ids of the behaviours, each of which needs a prompt.

    Raises:
        UserError: If the file is missing or broken, a line is not as expected (file and line number), a prompt comes
            twice, its id is no behaviour's, or a behaviour has none.
    """
    prompts: dict[str, list[ImportedPrompt]] = {}
    first: dict[tuple[str, str], str] = {}
    for line in json_lines(path, "prompts"):
        name, prompt = _prompt(line)
        if name not in behaviors:
            raise UserError(f"{line.where}: `id` must be that of a behaviour, none is {shown(name)}.")
        if (name, prompt.sha256) in first:
            raise UserError(
                f"{line.where}: a prompt must come once for each behaviour, `{name}` has this one already at "
                f"{first[name, prompt.sha256]}."
            )
        first[name, prompt.sha256] = line.where
        prompts.setdefault(name, []).append(prompt)
    if lacking := [name for name in behaviors if name not in prompts]:
        raise UserError(
            f"`{path}` must hold a prompt for every behaviour, it has none for {len(lacking)} of {len(behaviors)}, "
            f"such as `{lacking[0]}`; leave these out of the behaviours file."
        )
    return prompts


def _prompt(line: Line) -> tuple[str, ImportedPrompt]:
    where, record = line
    refuse_typos(record, ("hash",), where)
    if lost := lost_picture(record, ()):
        raise UserError(
            f"{where}: the key `{lost}` names a picture, which is not read here: behind a prompt stands the picture of "
            "its behaviour; name it there as `image`, or remove it here."
        )
    if asked := next((key for key in _ASKED if record.get(key)), None):
        raise UserError(
            f"{where}: the key `{asked}` is not read, what is sent stands in `messages` alone; put it there, or remove "
            "it."
        )
    for key in ("id", "source"):
        if not isinstance(record.get(key), str) or is_blank(record[key]):
            raise UserError(f"{where}: `{key}` must be a text that is not empty, got {shown(record.get(key))}.")
    messages = tuple(_messages(record.get("messages"), where))
    for number, turn in enumerate(messages, start=1):
        if turn["role"] != "assistant" and REPLACED in turn["content"] and record.get("hash") is None:
            raise UserError(
                f"{where}: message {number} cannot be sent: {BROKEN}, or give its `hash` if it was made so."
            )
    found, told = messages_hash(messages), record.get("hash")
    if told is not None and (not isinstance(told, str) or told.strip().lower().removeprefix("sha256:") != found):
        raise UserError(
            f"{where}: `hash` must be the SHA-256 of the messages, {found[:12]}..., got {shown(told)}; the messages "
            "are others than those it was made from. Take the prompt from its source again, or leave `hash` out."
        )
    return record["id"], ImportedPrompt(messages, record["source"], found, where)


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `messages` must be a list of turns, got {shown(value)}.")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise UserError(f"{where}: message {number} must hold `role` and `content` alone, got {shown(turn)}.")
        content = turn["content"]
        if not isinstance(content, str) or is_blank(content):
            raise UserError(
                f"{where}: the content of message {number} must be a text that is not empty, got {shown(content)}."
            )
        if reason := unfit(content):
            raise UserError(f"{where}: message {number} cannot be sent: {reason}.")
    roles = [turn["role"] for turn in value]
    turns = roles[1:] if roles[0] == "system" else roles
    if not len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError(
            f"{where}: the roles must alternate user, assistant and end with user, perhaps with system in front, got "
            f"{shown(roles)}; an answer that the attacker begins is `--attack prefill_only`."
        )
    return value
