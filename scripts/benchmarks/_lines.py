"""Files with a line for every measurement that is done: the same command goes on where it was stopped."""

from pathlib import Path
from typing import Any

from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl


def lines_of(file: Path, **asked: Any) -> list[dict[str, Any]]:
    """The lines of a file; none where there is none.

    Args:
        file: The lines.
        asked: What this command is told, by the lines' names for it; what a line does not say is taken to be so.

    Raises:
        UserError: If a line was measured with other settings: it would stand for one of these.
    """
    lines = read_jsonl(file) if file.exists() else []
    for line in lines:
        for name, value in asked.items():
            if line.get(name, value) != value:
                raise UserError(
                    f"`{file}` holds measurements with {name} {line[name]}, asked is {value}; give another --out."
                )
    return lines
