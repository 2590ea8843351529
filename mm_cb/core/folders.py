"""What a folder is, by the files in it, and what takes it: for error lines where another kind is wanted."""

import json
from pathlib import Path
from typing import Any

_KINDS = {
    "adapter_config.json": "an adapter, which `--adapter` takes",
    "probe.json": "a probe, which `--probe` takes",
    "config.json": "a model, which `--model` takes",
}
"""The file that tells a kind, in the order in which they are looked for."""
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
    if (kind := next((words for name, words in _KINDS.items() if _is_file(folder / name)), None)) is not None:
        return kind
    command = _command(folder / "run.json")
    if command is None:
        return None
    if built := next((name for name in _BUILT if _is_file(folder / name)), None):
        return f"a run of `mm-cb {command}`, of which `{folder / built}` is the data"
    return f"a run of `mm-cb {command}`" + (f", for {_TAKEN_BY[command]}" if command in _TAKEN_BY else "")


def but_is(folder: str | Path) -> str:
    """The same as the end of an error line: "; it is an adapter, ..."; empty of any other folder."""
    words = what_is(folder)
    return f"; it is {words}" if words else ""


def _command(file: Path) -> str | None:
    try:
        content: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    command = content.get("command") if isinstance(content, dict) and "recipe" in content else None
    return command if isinstance(command, str) else None


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):
        return False
