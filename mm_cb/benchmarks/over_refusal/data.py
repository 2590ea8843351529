"""Benign requests that look alarming, read from the files in which they are published, and from our own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import BENIGN, refuse_others
from mm_cb.core.folders import but_is
from mm_cb.core.folding import is_blank
from mm_cb.core.names import Ids, refuse_groups
from mm_cb.core.reading import Line, json_file, json_lines, label_of, refuse_replaced, refuse_typos, shown
from mm_cb.core.tables import read_table
from mm_cb.data.alike import content_of, once_each
from mm_cb.data.pictures import open_picture, path_inside

_CONTRAST = "contrast"
_XSTEST = ("id", "prompt", "type")
_MOSSBENCH = ("pid", "question", "file_name")
_COLUMNS = (*_XSTEST, "label", *_MOSSBENCH, "metadata_over")
_LABELS = ("safe", "unsafe")
_OPTIONAL = ("image", "category", "label")


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


def is_own(path: Path) -> bool:
    """Whether the requests are in our own format, and in no published one."""
    return path.suffix == ".jsonl" and not any("conversation" in line.values for line in json_lines(path, "requests"))


def read_requests(path: Path) -> list[BenignRequest]:
    """The requests of a file that deserve an answer, see `read_marked`."""
    return read_marked(path)[0]


def read_marked(path: Path) -> tuple[list[BenignRequest], int]:
    """The requests of a file that deserve an answer, and how many others it has, which it marks as such.

    Read MOSSBench's information file (.json) or its hub's table, XSTest's prompts (.csv; safe ones) or JSON lines.

    JSON lines are rows of WildChat, whose first request is asked, or ours:
    ``{"id", "prompt", "image": path inside the file's folder | null, "category", "label": "safe" | "unsafe"}``.

    Raises:
        UserError: If the file or a picture cannot be read, a record is not as expected, or an id comes twice.
    """
    readers: dict[str, Callable[[Path], Iterable[Line | None]]] = {
        ".json": _mossbench,
        ".csv": _table,
        ".tsv": _table,
        ".jsonl": _own,
    }
    if path.suffix not in readers:
        raise UserError(
            "`--data` must be our .jsonl, WildChat's rows as .jsonl, MOSSBench's information .json, XSTest's prompts "
            f".csv or AIcell/MOSSBench, got `{path}`{but_is(path)}."
        )
    requests: dict[str, BenignRequest] = {}
    ids, lines, own, marked = Ids("request"), list[Line](), is_own(path), 0
    for line in readers[path.suffix](path):
        if line is None:
            marked += 1
            continue
        request = _request(line, path)
        if own:  # a published set is as its authors left it
            refuse_replaced(line.values, line.where)
        ids.take(request.id, line.where)
        requests[request.id] = request
        lines.append(line)
    if own:
        refuse_groups(lines, ["category"])
    if not requests:
        left_out = f"; {marked} are marked as unsafe, and left out" if marked else ""
        raise UserError(f"`{path}` must hold at least one benign request, it holds none{left_out}.")
    return list(requests.values()), marked


def marked_note(read: Sequence[object], marked: int) -> str:
    """A line about those that their file marks, or nothing."""
    how = "marked as unsafe (`label`, a contrast of the data set) or, in chats, as toxic or redacted"
    return f"left out: {marked} of {len(read) + marked} requests, which are {how}" if marked else ""


def distinct(requests: Iterable[BenignRequest]) -> list[BenignRequest]:
    """Every request once: of those with the same words and the same picture the first, as one item and not several."""
    return once_each(requests, lambda one: content_of([one.prompt], one.image))


def _own(path: Path) -> Iterable[Line | None]:
    for line in json_lines(path, "requests"):
        if "conversation" in line.values:
            yield from _wildchat(line)
            continue
        refuse_others(line.values, (BENIGN,), line.where)
        refuse_typos(line.values, _OPTIONAL, line.where)
        yield line if _is_safe(line) else None


def _is_safe(line: Line) -> bool:
    """Whether a request is benign, by its ``label`` and its ``type``, as XSTest has them."""
    where, row = line
    kind, label = row.get("type") or "", "safe" if row.get("label") is None else row["label"]
    known = label.strip().lower() if isinstance(label, str) else None
    contrast = isinstance(kind, str) and kind.strip().lower().startswith(_CONTRAST)
    if known not in _LABELS:
        raise UserError(f"{where}: `label` must be safe or unsafe, got {shown(label)}.")
    if contrast and known == "safe" and row.get("label") is not None:
        raise UserError(
            f"{where}: `type` and `label` must agree: {shown(kind)} is an unsafe prompt in contrast to a safe one, but "
            f"`label` is {shown(label)}; correct one of them."
        )
    return known == "safe" and not contrast


def _wildchat(line: Line) -> Iterable[Line | None]:
    """The first request of a chat of WildChat; none of one that is marked as toxic, or as changed for privacy."""
    where, row = line
    turns, name = row["conversation"], row.get("conversation_hash", row.get("conversation_id"))
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or first.get("role") != "user":
        raise UserError(
            f"{where}: `conversation` must begin with a turn of the user, as in WildChat, got {shown(turns)}."
        )
    marks = [row.get("toxic"), row.get("redacted"), first.get("toxic"), first.get("redacted")]
    if not all(mark in (True, False, None) for mark in marks):
        raise UserError(f"{where}: `toxic` and `redacted` must be true or false, as in WildChat, got {shown(marks)}.")
    asked = Line(where, {"id": name, "prompt": first.get("content"), "category": row.get("language")})
    yield None if any(marks) else asked


def _mossbench(path: Path) -> Iterable[Line]:
    content = json_file(path, dict, "a JSON object, id to request, as in MOSSBench")
    for pid, record in content.items():
        where = f"{path}, entry {pid}"
        if not isinstance(record, dict):
            raise UserError(f"{where} must be a JSON object as in MOSSBench, got {type(record).__name__}.")
        kind: Any = record.get("metadata") if isinstance(record.get("metadata"), dict) else {}
        category = kind.get("over") or kind.get("oversensitivity type") or None
        named = {"id": pid, "prompt": record.get("question"), "image": record.get("image"), "category": category}
        yield Line(where, named)


def _table(path: Path) -> Iterable[Line | None]:
    columns, rows = read_table(path, _COLUMNS)
    named, wanted = ("MOSSBench", _MOSSBENCH) if "file_name" in columns else ("XSTest", _XSTEST)
    if missing := [name for name in wanted if name not in columns]:
        raise UserError(f"`{path}` must have {named}'s columns {', '.join(wanted)}; it lacks {', '.join(missing)}.")
    return _mossbench_table(rows, path) if named == "MOSSBench" else _xstest_table(rows)


def _xstest_table(rows: Iterable[Line]) -> Iterable[Line | None]:
    """XSTest's safe prompts; those in contrast to them are not benign."""
    for line in rows:
        if not (kind := line.values["type"].strip()):
            raise UserError(f"{line.where}: `type` must say whether the prompt is a contrast, it is empty.")
        asked = Line(line.where, {"id": line.values["id"], "prompt": line.values["prompt"], "category": kind})
        yield asked if _is_safe(line) else None


def _mossbench_table(rows: Iterable[Line], path: Path) -> Iterable[Line | None]:
    """MOSSBench as its hub page lays it out: one table for images/ and for contrast_images/, which are not benign."""
    for where, row in rows:
        name = row["file_name"].strip()
        if name.lower().startswith(_CONTRAST):
            yield None
        elif name:
            image = name if (path.parent / name).is_file() else f"images/{name}"
            category = row.get("metadata_over") or None
            yield Line(where, {"id": row["pid"], "prompt": row["question"], "image": image, "category": category})


def _request(line: Line, path: Path) -> BenignRequest:
    where, record = line
    wrong = [k for k in ("id", "prompt") if not isinstance(record.get(k), str) or is_blank(record[k])]
    if wrong:
        raise UserError(f"{where} must have non-empty texts for `id` and `prompt`, wrong or missing: {wrong}.")
    category = label_of(record, "category", where)
    return BenignRequest(record["id"], record["prompt"], _picture(record.get("image"), path, where), category)


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
    picture = next((place for place in places if os.path.lexists(place)), None)
    if picture is None:
        raise UserError(f"{where}: picture `{places[0]}` does not exist; get the data set's pictures.")
    open_picture(picture, where)
    return picture
