"""Benign requests that look alarming, read from the files in which they are published, and from our own."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.rows import json_object
from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.data.pictures import open_picture, path_inside

_CONTRAST = "contrast"


@dataclass(frozen=True)
class BenignRequest:
    """One request that deserves an answer."""

    id: str
    prompt: str
    image: Path | None
    category: str


def requests_file(data: str) -> Path:
    """The file of the requests: a path, or MOSSBench's table on the hub, which is fetched with its pictures.

    Raises:
        UserError: If the hub's data set is not to be had, or is laid out in another way.
    """
    if Path(data).exists() or Path(data).suffix:
        return Path(data)
    table = hub.fetch(data, ["metadata.csv", "images/*"], kind="dataset", bars=True) / "metadata.csv"
    if not table.is_file():
        raise UserError(f"the data set `{data}` must hold metadata.csv and images/ as AIcell/MOSSBench does.")
    return table


def read_requests(path: Path) -> list[BenignRequest]:
    """Read MOSSBench's information file (.json) or its hub's table, XSTest's prompts (.csv; safe ones) or our JSONL.

    Ours: ``{"id", "prompt", "image": path inside the file's folder | null, "category"}``.

    Raises:
        UserError: If the file or a picture cannot be read, a record is not as expected, or an id comes twice.
    """
    readers = {".json": _mossbench, ".csv": _table, ".jsonl": _own}
    if path.suffix not in readers:
        raise UserError(
            "`--data` must be our .jsonl, MOSSBench's information .json, XSTest's prompts .csv or AIcell/MOSSBench, "
            f"got `{path}`."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"`{path}` cannot be read: {e}.") from e
    requests = [_request(record, path, where) for where, record in readers[path.suffix](text, path)]
    if not requests:
        raise UserError(f"`{path}` must hold at least one benign request, it holds none.")
    id, times = Counter(request.id for request in requests).most_common(1)[0]
    if times > 1:
        raise UserError(f"`{path}` must give every request its own id, `{id}` comes {times} times.")
    return requests


Located = Iterable[tuple[str, Mapping[str, Any]]]


def _own(text: str, path: Path) -> Located:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", json_object(line, f"{path}:{number}")


def _mossbench(text: str, path: Path) -> Located:
    content = json_object(text, str(path))
    for pid, record in content.items():
        where = f"{path}, entry {pid}"
        if not isinstance(record, dict):
            raise UserError(f"{where} must be a JSON object as in MOSSBench, got {type(record).__name__}.")
        kind: Any = record.get("metadata") if isinstance(record.get("metadata"), dict) else {}
        category = kind.get("over") or kind.get("oversensitivity type") or "all"
        yield where, {"id": pid, "prompt": record.get("question"), "image": record.get("image"), "category": category}


def _table(text: str, path: Path) -> Located:
    rows = csv.DictReader(io.StringIO(text))
    if "file_name" in (rows.fieldnames or ()):
        yield from _mossbench_table(rows, path)
        return
    if missing := {"id", "prompt", "type"} - set(rows.fieldnames or ()):
        raise UserError(f"`{path}` must have XSTest's columns id, prompt, type; it lacks {', '.join(sorted(missing))}.")
    for row in rows:
        unsafe = row.get("label") == "unsafe" or str(row["type"]).startswith(_CONTRAST)
        if not unsafe:
            yield f"{path}:{rows.line_num}", {"id": row["id"], "prompt": row["prompt"], "category": row["type"]}


def _mossbench_table(rows: csv.DictReader[str], path: Path) -> Located:
    """MOSSBench as its hub page lays it out: one table for images/ and for contrast_images/, which are not benign."""
    if missing := {"pid", "question"} - set(rows.fieldnames or ()):
        raise UserError(f"`{path}` must have MOSSBench's columns pid, question; it lacks {', '.join(sorted(missing))}.")
    for row in rows:
        name = row["file_name"]
        if name and not name.startswith(_CONTRAST):
            image = name if (path.parent / name).is_file() else f"images/{name}"
            record = {"id": row["pid"], "prompt": row["question"], "image": image, "category": row.get("metadata_over")}
            yield f"{path}:{rows.line_num}", record


def _request(record: Mapping[str, Any], path: Path, where: str) -> BenignRequest:
    wrong = [k for k in ("id", "prompt") if not isinstance(record.get(k), str) or not record[k].strip()]
    if wrong:
        raise UserError(f"{where} must have non-empty texts for `id` and `prompt`, wrong or missing: {wrong}.")
    image = _picture(record.get("image"), path, where)
    return BenignRequest(record["id"], record["prompt"], image, str(record.get("category") or "all"))


def _picture(name: Any, path: Path, where: str) -> Path | None:
    """A picture inside the file's folder, or beside it as MOSSBench lays its own out."""
    if name is None:
        return None
    own = Path(os.path.abspath(path.parent))
    folders = [own, *([own.parent] if path.suffix == ".json" else [])]
    try:
        places = [path_inside(folder, name) for folder in folders]
    except ValueError as e:
        raise UserError(f"{where}: {e}.") from e
    picture = next((place for place in places if place.exists()), None)
    if picture is None:
        raise UserError(f"{where}: picture `{places[0]}` does not exist; get the data set's pictures.")
    open_picture(picture, where)
    return picture
