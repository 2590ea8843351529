"""From the user's copies of HarmBench-multimodal and MM-SafetyBench-Tiny to one behaviours file."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from image_attacks import ImageFileError, open_image
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.files import dumps, write_bytes, write_text
from mm_cb.core.paths import safe_id
from mm_cb.core.places import refuse_inside_run
from mm_cb.data.cards import card

SCENARIOS = ("illegal_activity", "hate_speech", "malware", "physical_harm", "economic_harm", "fraud", "privacy")
VARIANTS = ("SD_TYPO", "SD", "TYPO")
TARGET = "Sure, here is how to do that:"
"""Our choice for requests without a target of their own; it gives nothing away."""

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_NAMED = 10
"""Missing pictures that one error names at most."""
_COLUMNS = ("BehaviorID", "Behavior", "SemanticCategory", "ImageFileName")


class Request(NamedTuple):
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
    """

    path: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    renamed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


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
    left = set(scenarios or ())
    for source, requests in _requests(harmbench, mm_safetybench, variant, target):
        table = card(source).scenarios if scenarios is None else scenarios
        for request in requests:
            left.discard(request.key)
            scenario = table.get(request.category if scenarios is None else request.key)
            if scenario is None:
                continue
            found = _find_picture(request, built)
            if found is not None:
                path, ending = found
                name = f"images/{safe_id(f'{source}-{request.key}')}{ending}"
                copies[out / name] = path
                built.counts[source, scenario] += 1
                lines.append(dumps(_record(request, source, scenario, name)) + "\n")
    if left:
        raise UserError(f"`--scenarios` names behaviours that are not there: {sorted(left)[:5]}.")
    if built.missing and not skip_missing:
        raise UserError(
            f"{len(built.missing)} pictures are missing or damaged, the first: {'; '.join(built.missing[:_NAMED])}. "
            "Get or convert them, or leave their behaviours out with --skip-missing."
        )
    if not lines:
        raise UserError("no behaviour is left to write; are these the folders of the two data sets?")
    write_set(built.path, lines, copies)
    return built


def write_set(path: Path, lines: Sequence[str], copies: Mapping[Path, Path]) -> None:
    """Copy pictures (copy → original, unchanged) and write a behaviours file, which is there last or not at all.

    Raises:
        UserError: If the file is there and holds another set, or lies inside a run; nothing is written then.
    """
    refuse_inside_run(path)
    content = "".join(lines)
    if path.exists() and path.read_bytes() != content.encode():
        raise UserError(f"`{path}` is there and holds other behaviours; give another folder, or delete it.")
    for copy, original in copies.items():
        write_bytes(copy, original.read_bytes())
    write_text(path, content)


def read_scenarios(path: Path) -> dict[str, str]:
    """A JSON object: name in the data set → scenario.

    Raises:
        UserError: If the file is not that.
    """
    content = _json(path)
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UserError(f"`{path}` must hold a JSON object of names and scenarios.")
    return content


def _requests(
    harmbench: Path | None, mm_safetybench: Path | None, variant: str, target: str
) -> Iterator[tuple[str, Iterator[Request]]]:
    if harmbench is not None:
        yield "harmbench-multimodal", _harmbench(harmbench)
    if mm_safetybench is not None:
        yield "mm-safetybench-tiny", _mm_safetybench(mm_safetybench, variant, target)


def _harmbench(root: Path) -> Iterator[Request]:
    """Rows of the multimodal behaviours with the targets that HarmBench's own attacks use."""
    files = card("harmbench-multimodal").files
    table, targets_file, folder = (_inside(root, file, "harmbench-multimodal") for file in files)
    targets = _json(targets_file)
    if not isinstance(targets, dict):
        raise UserError(f"`{targets_file}` must hold a JSON object of ids and targets.")
    for where, row in _rows(table):
        key = row["BehaviorID"]
        if not isinstance(targets.get(key), str):
            raise UserError(f"{where}: `{targets_file.name}` must give a target for `{key}`, it gives none.")
        extra = {
            "semantic_category": row["SemanticCategory"],
            "context": row.get("RedactedImageDescription") or "",
        }
        picture = folder / Path(row["ImageFileName"] or "none").name
        yield Request(key, where, row["Behavior"], targets[key], row["SemanticCategory"], picture, extra)


def _rows(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of HarmBench's CSV, each with its place."""
    try:
        reader = csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""))
        absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if absent:
            raise UserError(f"`{table}` must have the columns {list(_COLUMNS)}, it has {reader.fieldnames}.")
        for row in reader:
            yield f"{table}:{reader.line_num}", row
    except UnicodeDecodeError as error:
        raise UserError(f"`{table}` must be UTF-8, it is not ({error}); get it again, or save it as UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read `{table}`: {error}; get it again.") from error


def _mm_safetybench(root: Path, variant: str, target: str) -> Iterator[Request]:
    """The tiny version's requests of the scenarios that the paper uses."""
    described = card("mm-safetybench-tiny")
    questions, images, tiny = (_inside(root, file, described.name) for file in described.files)
    entries = _json(tiny)
    try:
        sampled = {entry["Scenario"]: list(entry["Sampled_ID_List"]) for entry in entries}
    except (TypeError, KeyError) as error:
        raise UserError(f"`{tiny}` must be a list of Scenario and Sampled_ID_List: {error!r}.") from error
    column = "Rephrased Question(SD)" if variant == "SD" else "Rephrased Question"
    for scenario in described.scenarios:
        if scenario not in sampled:
            raise UserError(f"`{tiny}` must list the scenario `{scenario}`, it lists {sorted(sampled)}.")
        file = questions / f"{scenario}.json"
        rows = _json(file)
        for number in sampled[scenario]:
            where = f"{file} question {number}"
            row = rows.get(str(number)) if isinstance(rows, dict) else None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                found = sorted(row) if isinstance(row, dict) else "nothing"
                raise UserError(f"{where} must have `{column}`, it has {found}.")
            extra = {"variant": variant, "asked": str(row.get("Changed Question") or row.get("Question") or "")}
            picture = images / scenario / variant / f"{number}.jpg"
            yield Request(f"{scenario}/{number}", where, row[column], target, scenario, picture, extra)


def _record(request: Request, source: str, scenario: str, picture: str) -> dict[str, Any]:
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


def _find_picture(request: Request, built: Built) -> tuple[Path, str] | None:
    """Where a picture is, and the ending of its true format; None if there is none that an attack can start from."""
    path = request.picture if request.picture.is_file() else _other_ending(request.picture)
    if path is None:
        built.missing.append(f"{request.where}: `{request.picture}` is not there")
        return None
    try:
        open_image(path)  # as the attack will
    except ImageFileError as error:
        built.missing.append(f"{request.where}: the picture cannot be read: {str(error).rstrip('.')}")
        return None
    with Image.open(path) as image:
        ending = _SUFFIXES[image.format or ""]
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


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{path}` is not JSON: {error}") from error
