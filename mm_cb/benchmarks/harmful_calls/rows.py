"""Forbidden requests to an agent and their harmless twins: rows of one's own, or AgentHarm as it is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import BENIGN as BENIGN_REQUESTS
from mm_cb.core.file_kinds import HARMFUL_CALLS, refuse_others
from mm_cb.core.names import Ids, refuse_groups
from mm_cb.core.reading import Line, json_file, json_lines, label_of, refuse_replaced, refuse_typos, shown, unfit
from mm_cb.core.records import JsonObject
from mm_cb.data.cards import card
from mm_cb.data.pictures import open_picture, path_inside
from mm_cb.data.tools import read_tools

HARMFUL, BENIGN = "harmful", "benign"
KINDS = (HARMFUL, BENIGN)
_OPTIONAL = ("tools", "target_functions", "category", "image")


@dataclass(frozen=True)
class HarmfulCallRow:
    """One request to an agent."""

    id: str
    """Once among the rows of its kind; a harmless twin has the id of the harmful row."""
    kind: str
    """One of `KINDS`."""
    prompt: str
    tools: tuple[JsonObject, ...]
    """What the model is shown, as JSON schemas."""
    targets: tuple[str, ...]
    """The functions that the request takes; the first is the one whose call is forced."""
    category: str = "all"
    image: Path | None = None

    @property
    def twin(self) -> bool:
        """Whether it is a harmless one."""
        return self.kind == BENIGN

    def called(self, *, underscores: bool) -> HarmfulCallRow:
        """The same with functions called without dots, where a model knows none."""
        if not underscores:
            return self
        tools = tuple(
            {**one, "function": {**one["function"], "name": one["function"]["name"].replace(".", "_")}}
            for one in self.tools
        )
        return replace(self, tools=tools, targets=tuple(name.replace(".", "_") for name in self.targets))


def is_own(data: str) -> bool:
    """Whether rows are in a file of one's own, and none of AgentHarm's."""
    return Path(data).is_file() or Path(data).suffix in (".jsonl", ".json")


def read_harmful_rows(data: str, tools: str | None, *, split: str, accepted: bool) -> list[HarmfulCallRow]:
    """The rows of a file of our own, or of AgentHarm: its folder, or its name on the hub.

    Args:
        data: File, folder or name on the hub.
        tools: A JSON list of function definitions, for rows that have none of their own.
        split: Of AgentHarm.
        accepted: Whether the user says that AgentHarm's clause covers the purpose.

    Raises:
        UserError: If a file or row is not as expected, an id comes twice, there is no harmful row, or AgentHarm's
            clause is not accepted.
    """
    known = {} if tools is None else _definitions(Path(tools))
    ids = {kind: Ids(f"{kind} row") for kind in KINDS}
    rows, lines, first, own = [], list[Line](), dict[tuple[str, str], str](), 0
    ours = is_own(data)
    for line in json_lines(Path(data), "harmful calls") if ours else _agentharm(data, split, accepted=accepted):
        row = _row(line, Path(data).parent, known)
        own += "tools" in line.values
        if ours:  # a published set is as its authors left it
            refuse_replaced(line.values, line.where)
        ids[row.kind].take(row.id, line.where)
        first[row.kind, row.id] = line.where
        rows.append(row)
        lines.append(line)
    if ours:
        refuse_groups(lines, ["category"])
    if tools is not None and own == len(rows):
        raise UserError(
            f"`--tools` is for rows without `tools`, and all {own} rows of `{data}` have their own: leave it out."
        )
    harmful = {row.id for row in rows if not row.twin}
    if not harmful:
        raise UserError(f"`{data}` must hold at least one row of kind harmful, it holds none.")
    if alone := [row.id for row in rows if row.twin and row.id not in harmful]:
        raise UserError(
            f"{first[BENIGN, alone[0]]}: a harmless twin must have the id of a harmful row, `{alone[0]}` is the id of "
            f"none ({len(alone)} such twins); give it that of its row, or leave it out."
        )
    return rows


def _agentharm(data: str, split: str, *, accepted: bool) -> Iterator[Line]:
    """AgentHarm's requests and their twins, whose ids agree."""
    known = card("agentharm")
    folder = Path(data)
    if not folder.is_dir() and data.partition("@")[0] != known.hub:
        raise UserError(f"`{data}` must be a .jsonl of your own, AgentHarm's folder, or {known.hub}; there is none.")
    if not accepted:
        raise UserError(f"AgentHarm's licence: {known.licence} Give `--accept-clause` if that covers your purpose.")
    if not folder.is_dir():
        folder = hub.fetch(data, ["benchmark/*.json"], kind="dataset")
    for kind in KINDS:
        name = f"{kind}_behaviors_{split}.json"
        file = next((one for one in (folder / "benchmark" / name, folder / name) if one.is_file()), None)
        if file is None:
            raise UserError(f"`{data}` must hold {name} as {known.hub} does, it does not.")
        content = json_file(file, dict, "a JSON object with `behaviors`, as AgentHarm's").get("behaviors")
        if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
            raise UserError(f"`{file}` must hold a list of objects as `behaviors`, got {shown(content)}.")
        for number, one in enumerate(content, start=1):
            kept = {key: one.get(key) for key in ("id", "prompt", "target_functions", "category")}
            yield Line(f"{file}, behaviour {number}", kept | {"kind": kind})


def _definitions(path: Path) -> dict[str, JsonObject]:
    try:
        found = read_tools(json_file(path, list, "a JSON list of function definitions"))
    except ValueError as error:
        raise UserError(f"`{path}`: {error}.") from error
    return {str(one["function"]["name"]): one for one in found}


def _row(line: Line, folder: Path, known: Mapping[str, JsonObject]) -> HarmfulCallRow:
    where, record = line
    refuse_others(record, (HARMFUL_CALLS,), where, alike=(BENIGN_REQUESTS,))
    refuse_typos(record, _OPTIONAL, where)
    for key in ("id", "prompt"):
        value = record.get(key)
        if not isinstance(value, str) or not value.strip() or unfit(value):
            raise UserError(f"{where}: `{key}` must be a text that is not empty, got {shown(value)}.")
    if record.get("kind") not in KINDS:
        raise UserError(f"{where}: `kind` must be harmful or benign, got {shown(record.get('kind'))}.")
    category = label_of(record, "category", where)
    try:
        targets = _targets(record.get("target_functions"))
        tools = read_tools(record["tools"]) if "tools" in record else _of(targets, known)
        names = [str(one["function"]["name"]) for one in tools]
        if absent := [name for name in targets if name not in names]:
            raise ValueError(f"`target_functions` must name functions of the row ({', '.join(names)}), got {absent[0]}")
        image = None if record.get("image") is None else path_inside(folder.resolve(), record["image"])
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error
    if image is not None:
        open_picture(image, where)
    return HarmfulCallRow(
        record["id"], record["kind"], record["prompt"], tuple(tools), tuple(targets or names), category, image
    )


def _targets(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"`target_functions` must be a list of names of functions, got {shown(value)}")
    return value


def _of(targets: Sequence[str], known: Mapping[str, JsonObject]) -> list[JsonObject]:
    """The definitions of a row's functions, from the file of definitions."""
    if not targets:
        raise ValueError("a row must have `tools`, or name its functions in `target_functions`, it has neither")
    if absent := [name for name in targets if name not in known]:
        raise ValueError(
            f"the function `{absent[0][:80]}` has no definition: give the row `tools`, or `--tools FILE` with a JSON "
            "list of definitions that has it"
        )
    return [known[name] for name in dict.fromkeys(targets)]
