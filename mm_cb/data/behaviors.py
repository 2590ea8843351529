"""From the user's copies of HarmBench-multimodal and MM-SafetyBench-Tiny to one behaviours file."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from image_attacks.file_kinds import picture_format
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.files import dumps, write_bytes, write_text
from mm_cb.core.paths import safe_id
from mm_cb.core.places import refuse_inside_run
from mm_cb.core.reading import Line, file_bytes, json_file, json_lines, shown
from mm_cb.core.records import JsonObject
from mm_cb.core.tables import read_table
from mm_cb.data.alike import content_of
from mm_cb.data.behaviors_file import parse_behavior, read_behaviors
from mm_cb.data.cards import card
from mm_cb.data.pictures import PictureError, open_picture

SCENARIOS = ("illegal_activity", "hate_speech", "malware", "physical_harm", "economic_harm", "fraud", "privacy")
VARIANTS = ("SD_TYPO", "SD", "TYPO")
TARGET = "Sure, here is how to do that:"
"""Our choice for requests without a target of their own; it gives nothing away."""

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_NAMED = 10
"""Missing pictures that one error names at most."""
_COLUMNS = ("BehaviorID", "Behavior", "SemanticCategory", "ImageFileName")
_CONTEXT = "RedactedImageDescription"


class SourceBehavior(NamedTuple):
    """One behaviour as its data set has it."""

    key: str
    """Its name in the data set: HarmBench's BehaviorID, or ``01-Illegal_Activitiy/12``."""
    where: str
    prompt: str
    target: str
    category: str
    """The data set's own."""
    picture: Path
    extra: Mapping[str, str]


@dataclass
class Built:
    """What was built.

    Attributes:
        path: The behaviours file.
        counts: Behaviours by data set and scenario.
        renamed: Pictures whose file name has the wrong ending or another one than the data set says.
        missing: Pictures that are not there or that no attack can start from; their behaviours were left out.
        repeated: Behaviours that ask what an earlier one asks, with the same picture; they were left out.
        others: Behaviours of a category that the data card takes into no scenario; they were left out.
    """

    path: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    renamed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def build_behaviors(
    out: Path,
    *,
    harmbench: Path | None = None,
    mm_safetybench: Path | None = None,
    variant: str = "SD_TYPO",
    target: str = TARGET,
    scenarios: Mapping[str, str] | None = None,
    skip_missing: bool = False,
) -> Built:
    """Write ``behaviors.jsonl`` and its pictures into a folder.

    Args:
        out: The folder; the pictures are copied into its ``images``, unchanged but for the ending of their names.
        harmbench: The user's clone of HarmBench.
        mm_safetybench: The user's clone of MM-SafetyBench with its pictures.
        variant: Which pictures of MM-SafetyBench: drawn (SD), written (TYPO) or both.
        target: What the attack pushes the model to say where the data set names no target.
        scenarios: Name in the data set → one of `SCENARIOS`; only these behaviours are taken. None = the tables of the
            data cards.
        skip_missing: Leave behaviours out whose picture is missing, instead of stopping.

    Raises:
        UserError: If a file is missing or not as expected, pictures are missing or damaged, or ``out`` holds another
            set; nothing is written then.
    """
    if harmbench is None and mm_safetybench is None:
        raise UserError("give your copy of HarmBench (--harmbench), of MM-SafetyBench (--mm-safetybench), or both.")
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    if not target.strip():
        raise UserError("`--target` must be a text that is not empty.")
    for name in (scenarios or {}).values():
        if name not in SCENARIOS:
            raise unknown("scenario", name, SCENARIOS)
    built = Built(out / "behaviors.jsonl")
    lines: list[str] = []
    copies: dict[Path, Path] = {}
    first: dict[str, str] = {}
    asked: dict[Hashable, SourceBehavior] = {}
    left = set(scenarios or ())
    for source, requests in _requests(harmbench, mm_safetybench, variant, target):
        table = card(source).scenarios if scenarios is None else scenarios
        for request in requests:
            left.discard(request.key)
            if (named := first.setdefault(f"{source} {request.key}", request.where)) is not request.where:
                raise UserError(f"{request.where}: the id `{request.key}` was used at {named}; correct the data set.")
            scenario = table.get(request.category if scenarios is None else request.key)
            if scenario is None:
                if scenarios is None:
                    built.others.append(f"{request.where}: the category {shown(request.category)}")
                continue
            found = _find_picture(request, built)
            if found is not None:
                path, ending = found
                content = content_of([request.prompt, request.target], path)
                if (same := asked.setdefault(content, request)) is not request:
                    built.repeated.append(f"{request.where}: `{request.key}` asks what `{same.key}` asks")
                    continue
                name = f"images/{safe_id(f'{source}-{request.key}')}{ending}"
                copies[out / name] = path
                built.counts[source, scenario] += 1
                record = _record(request, source, scenario, name)
                parse_behavior(Line(request.where, record | {"image": None}), built.path)  # as whoever reads it will
                lines.append(dumps(record) + "\n")
    if left:
        raise UserError(f"`--scenarios` names behaviours that are not there: {sorted(left)[:5]}.")
    if built.missing and not skip_missing:
        raise UserError(
            f"{len(built.missing)} pictures are missing or damaged, the first: {'; '.join(built.missing[:_NAMED])}. "
            "Get or convert them, or leave their behaviours out with --skip-missing."
        )
    if not lines:
        if built.others:
            raise UserError(
                f"no behaviour is left to write: {len(built.others)} are of categories that are not taken, the first "
                f"{built.others[0]}; take them by name with --scenarios."
            )
        raise UserError("no behaviour is left to write; are these the folders of the two data sets?")
    write_set(built.path, lines, copies)
    return built


def write_set(path: Path, lines: Sequence[str], copies: Mapping[Path, Path]) -> None:
    """Copy pictures (copy → original, unchanged) and write a behaviours file, which is there last or not at all.

    A file that was built here before and that no reader takes is replaced.

    Raises:
        UserError: If the file is there and holds another set, or lies inside a run; nothing is written then.
    """
    refuse_inside_run(path)
    content = "".join(lines)
    if path.exists() and file_bytes(path) != content.encode() and not _is_broken_build(path):
        raise UserError(f"`{path}` is there and holds other behaviours; give another folder, or delete it.")
    for copy, original in copies.items():
        write_bytes(copy, original.read_bytes())
    write_text(path, content)


def _is_broken_build(path: Path) -> bool:
    """Whether a file was built here, and cannot be read as behaviours."""
    try:
        if not all(line.values.keys() & {"source_id", "benign_target"} for line in json_lines(path, "behaviours")):
            return False
        read_behaviors(path)
    except UserError:
        return True
    return False


def read_scenarios(path: Path) -> dict[str, str]:
    """A JSON object: name in the data set → scenario.

    Raises:
        UserError: If the file is not that.
    """
    content: JsonObject = json_file(path, dict, "a JSON object of names and scenarios")
    for key, value in content.items():
        if not isinstance(value, str):
            raise UserError(f"`{path}`: the scenario of `{key}` must be a text, got {shown(value)}.")
    return content


def _requests(
    harmbench: Path | None, mm_safetybench: Path | None, variant: str, target: str
) -> Iterator[tuple[str, Iterator[SourceBehavior]]]:
    if harmbench is not None:
        yield "harmbench-multimodal", _harmbench(harmbench)
    if mm_safetybench is not None:
        yield "mm-safetybench-tiny", _mm_safetybench(mm_safetybench, variant, target)


def _harmbench(root: Path) -> Iterator[SourceBehavior]:
    """Rows of the multimodal behaviours with the targets that HarmBench's own attacks use."""
    files = card("harmbench-multimodal").files
    table, targets_file, folder = (_inside(root, file, "harmbench-multimodal") for file in files)
    targets = json_file(targets_file, dict, "a JSON object of ids and targets")
    for where, row in _rows(table):
        key = row["BehaviorID"]
        if not isinstance(targets.get(key), str):
            raise UserError(f"{where}: `{targets_file.name}` must give a target for `{key}`, it gives none.")
        extra = {
            "semantic_category": row["SemanticCategory"],
            "context": row.get(_CONTEXT, ""),
        }
        picture = folder / Path(row["ImageFileName"] or "none").name
        yield SourceBehavior(key, where, row["Behavior"], targets[key], row["SemanticCategory"], picture, extra)


def _rows(table: Path) -> list[Line]:
    """The rows of HarmBench's CSV, each with its place."""
    columns, rows = read_table(table, (*_COLUMNS, _CONTEXT))
    if any(column not in columns for column in _COLUMNS):
        raise UserError(f"`{table}` must have the columns {list(_COLUMNS)}, it has {columns}.")
    return rows


def _mm_safetybench(root: Path, variant: str, target: str) -> Iterator[SourceBehavior]:
    """The tiny version's requests of the scenarios that the paper uses."""
    described = card("mm-safetybench-tiny")
    questions, images, tiny = (_inside(root, file, described.name) for file in described.files)
    sampled = _sampled(tiny)
    column = "Rephrased Question(SD)" if variant == "SD" else "Rephrased Question"
    for scenario in described.scenarios:
        if scenario not in sampled:
            raise UserError(f"`{tiny}` must list the scenario `{scenario}`, it lists {sorted(sampled)}.")
        file = questions / f"{scenario}.json"
        rows = json_file(file, dict, "a JSON object, number to question")
        for number in sampled[scenario]:
            where = f"{file} question {number}"
            row = rows.get(str(number))
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                found = sorted(row) if isinstance(row, dict) else "nothing"
                raise UserError(f"{where} must have `{column}`, it has {found}.")
            extra = {"variant": variant, "asked": str(row.get("Changed Question") or row.get("Question") or "")}
            picture = images / scenario / variant / f"{number}.jpg"
            yield SourceBehavior(f"{scenario}/{number}", where, row[column], target, scenario, picture, extra)


def _sampled(tiny: Path) -> dict[str, list[Any]]:
    """Scenario → numbers of its questions that the tiny version has."""
    sampled: dict[str, list[Any]] = {}
    for number, entry in enumerate(json_file(tiny, list, "a list of Scenario and Sampled_ID_List"), start=1):
        known = entry if isinstance(entry, dict) else {}
        name, ids = known.get("Scenario"), known.get("Sampled_ID_List")
        if not isinstance(name, str) or not isinstance(ids, list) or not all(isinstance(id, int | str) for id in ids):
            raise UserError(f"`{tiny}`, entry {number} must hold Scenario and Sampled_ID_List, got {shown(entry)}.")
        if name in sampled:
            raise UserError(f"`{tiny}`, entry {number}: the scenario `{name}` comes twice.")
        sampled[name] = ids
    return sampled


def _record(request: SourceBehavior, source: str, scenario: str, picture: str) -> JsonObject:
    return {
        "id": Path(picture).stem,
        "prompt": request.prompt,
        "target": request.target,
        "image": picture,
        "category": scenario,
        "source": source,
        "source_id": request.key,
        **request.extra,
    }


def _find_picture(request: SourceBehavior, built: Built) -> tuple[Path, str] | None:
    """Where a picture is, and the ending of its true format; None if there is none that an attack can start from."""
    path = request.picture if request.picture.is_file() else _other_ending(request.picture)
    if path is None:
        built.missing.append(f"{request.where}: `{request.picture}` is not there")
        return None
    try:
        open_picture(path)  # as the attack will
    except PictureError as error:
        built.missing.append(f"{request.where}: {str(error).rstrip('.')}")
        return None
    ending = _SUFFIXES[picture_format(path.read_bytes()) or ""]
    if path != request.picture or path.suffix.lower().replace("jpeg", "jpg").replace("tiff", "tif") != ending:
        built.renamed.append(f"{request.where}: {request.picture.name} is {path.name}, of format {ending[1:]}")
    return path, ending


def _other_ending(path: Path) -> Path | None:
    """A file of the same name with another ending."""
    there = sorted(path.parent.glob("*")) if path.parent.is_dir() else []
    return next((file for file in there if file.stem.lower() == path.stem.lower() and file.is_file()), None)


def _inside(root: Path, file: str, name: str) -> Path:
    """A file of a data set, in the layout of its repository or with the folder ``data`` left out."""
    for path in (root / file, root / file.removeprefix("data/"), root / Path(file).name, root / "data" / file):
        if path.exists():
            return path
    raise UserError(f"`{root}` must hold {file}, it does not; {card(name).get}.")
