"""What a folder is, by the files in it, and what takes it: for error lines where another kind is wanted."""

import json
import os
from pathlib import Path
from typing import Any

from mm_cb.core.records import JsonObject

_KINDS = {
    "adapter_config.json": "an adapter, which `--adapter` takes",
    "probe.json": "a probe, which `--probe` takes",
    "config.json": "a model, which `--model` takes",
}
"""The file that tells a kind, in the order in which they are looked for; a model's names its ``model_type``."""
_RUNS = "`mm-cb report` and `mm-cb judge`"
_TAKEN_BY = {
    "attack": f"`mm-cb attack verify`, {_RUNS}",
    "attack transfer": _RUNS,
    "attack check": "`mm-cb report`",
    "eval": _RUNS,
    "demo": f"{_RUNS}; its adapter is in `adapters/`",
}
_BUILT = ("pairs.jsonl", "benign.jsonl", "calls.jsonl")


def what_is(folder: str | Path) -> str | None:
    """A few words for a folder that mm-cb or transformers wrote, with what takes it; None of any other.

    For example: "an adapter, which `--adapter` takes".
    """
    folder = Path(folder)
    for name, words in _KINDS.items():
        if _is_file(folder / name) and (name != "config.json" or "model_type" in _content(folder / name)):
            return words
    run = _content(folder / "run.json")
    command = run.get("command") if "recipe" in run else None
    if not isinstance(command, str):
        return None
    if built := next((name for name in _BUILT if _is_file(folder / name)), None):
        return f"a run of `mm-cb {command}`, of which `{folder / built}` is the data"
    return f"a run of `mm-cb {command}`" + (f", for {_TAKEN_BY[command]}" if command in _TAKEN_BY else "")


def but_is(folder: str | Path) -> str:
    """The same as the end of an error line: "; it is an adapter, ..."; empty of any other folder."""
    words = what_is(folder)
    return f"; it is {words}" if words else ""


def looks_like(file: Path) -> str:
    """What lies where a file is missing and looks like it, with what to do, as the end of an error line; or nothing."""
    try:
        names = sorted(os.listdir(file.parent))
    except (OSError, ValueError):
        return ""
    wanted, stem = file.name.lower(), file.stem.lower()
    for advice, fits in (
        ("rename it", lambda name: name == wanted),
        (
            "a transfer left it, which is not done: finish it",
            lambda name: wanted in name and not name.endswith(".json"),
        ),
        ("fetch these parts as one file", lambda name: name == f"{wanted}.index.json"),
        ("it can run code when it is read: save it as safetensors", lambda name: name in _unsafe_weights(stem)),
    ):
        if found := next((name for name in names if fits(name.lower())), None):
            return f", `{found}` looks like it: {advice}"
    return ""


def _unsafe_weights(stem: str) -> list[str]:
    return [f"{stem}.{ending}" for ending in ("bin", "pt", "pth", "ckpt")]


def _content(file: Path) -> JsonObject:
    """The JSON object in a file; an empty one where there is none."""
    try:
        content: Any = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):
        return False
