"""The same requests and pictures with a harmless sentence to force: an attack's strength without a judge."""

from collections.abc import Sequence
from pathlib import Path

from image_attacks import BENIGN_TARGETS
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.paths import safe_id
from mm_cb.core.reading import json_lines
from mm_cb.data.behaviors import write_set
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.corpus import target_lines

_KEPT = ("id", "prompt", "category", "split")


def build_benign(behaviors: Path, out: Path, targets: Sequence[str] = BENIGN_TARGETS) -> Path:
    """Write ``behaviors.jsonl``, in which every target is a harmless sentence, and copies of its pictures.

    Requests and pictures stay as they are. What a judge would need to know of a request is left out: whether such an
    attack succeeded is the words' business, and an answer that is not the sentence says nothing about it.

    Args:
        behaviors: A behaviours file.
        out: Gets ``behaviors.jsonl`` and ``images/``.
        targets: Sentences, given to the behaviours in turn.

    Returns:
        The new file.

    Raises:
        UserError: If the file is broken, no target is given, or ``out`` holds another set; nothing is written then.
    """
    if not targets:
        raise UserError("there must be at least one harmless target, got none.")
    read_behaviors(behaviors)
    records = [line.values for line in json_lines(behaviors, "behaviours")]
    lines: list[str] = []
    copies: dict[Path, Path] = {}
    for number, record in enumerate(records):
        image = record.get("image")
        if image is not None:
            picture = behaviors.parent / image
            image = f"images/{safe_id(record['id'])}{picture.suffix}"
            copies[out / image] = picture
        kept = {key: record[key] for key in _KEPT if key in record}
        harmless = {"target": targets[number % len(targets)], "image": image, "benign_target": True}
        lines.append(dumps(kept | harmless) + "\n")
    write_set(out / "behaviors.jsonl", lines, copies)
    return out / "behaviors.jsonl"


def read_targets(path: Path) -> list[str]:
    """The lines of a text file, trimmed, without the empty ones.

    Raises:
        UserError: If the file cannot be read, holds none, or a line is no target, see `target_lines`.
    """
    targets = [text for _, text in target_lines(path, "targets", "a harmless target a line", "write it alone")]
    if not targets:
        raise UserError(f"`{path}` must hold a target per line, it holds none.")
    return targets
