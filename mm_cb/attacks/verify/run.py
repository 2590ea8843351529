"""``mm-cb attack verify``: every number of a run again, from its pictures, their JSON and the model alone."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_attacks import ImageFileError, linf_255
from mm_cb.attacks.judged_files import read_pictures
from mm_cb.attacks.threats import Threat
from mm_cb.attacks.verify.answers import Again, check_verdicts, compute_again
from mm_cb.attacks.verify.outputs import check_outputs
from mm_cb.attacks.verify.tries import check_tries
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress, console
from mm_cb.core.runs import file_sha256, read_jsonl, read_run
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import TOLERANCE, dtype_of, tolerance
from mm_cb.metrics.observations import rank, starts_with
from mm_cb.models import load_model

_KEYS = ("id", "image", "clean_image", "prompt", "target", "sha256", "clean_sha256", "epsilon", "loss", "attack")

_SHARED = (
    *("restart", "iterate", "epsilon", "distance", "loss", "objective_file", "objective_logged", "nll_base"),
    *("selected_step", "zero_gradients"),
)
"""What items.jsonl repeats of a picture's JSON, but for the verdict, which another judge may have given."""


@dataclass(frozen=True)
class Row:
    """One picture: what was recorded, what was found, and what disagrees (empty = nothing)."""

    image: str
    epsilon: int
    loss_recorded: float
    loss_found: float
    objective_gap: float
    disagreements: tuple[str, ...]
    other_answer: bool
    """The greedy answer, generated again, is another one. A disagreement only where arithmetic is the run's."""


def verify_run(folder: Path, *, model: str | None, adapter: str | None, device: str = "cpu") -> list[Row]:
    """Verify a run and print a table.

    Args:
        folder: A finished run of ``mm-cb attack``.
        model: Where its model lies here; None = where the run found it.
        adapter: Where its adapter lies here.
        device: Torch device.

    Raises:
        UserError: If something disagrees (the first picture is named), or the folder holds nothing to verify.
    """
    run = read_run(folder)
    recipe = run.get("recipe")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), str):
        raise UserError(f"`{folder}` must be a run of `mm-cb attack`; its run.json names no model.")
    artefacts = read_artefacts(folder)
    check_items(folder, artefacts)
    try:
        verdicts = check_verdicts(folder, recipe["model"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"`{folder / 'items.jsonl'}` must be as `mm-cb attack` wrote it: {type(error).__name__}, {error}."
        ) from error
    adapter = adapter or recipe.get("adapter")
    options = recipe.get("options", {})
    same_arithmetic = (recipe.get("device"), recipe.get("dtype")) == (device.partition(":")[0], "float32")
    loaded = load_model(
        model or recipe["model"],
        adapter=adapter,
        device=device,
        dtype=recipe.get("dtype", "float32"),
        image_backend=options.get("image_backend", "pil"),
    )
    rows = []
    with Progress() as progress:
        task = progress.task("verify", total=len(artefacts))
        for group in _groups(folder, artefacts, options.get("batch", 8)):
            subject = Subject(str(group[0]["subject"]["name"]), loaded, bool(group[0]["subject"]["adapted"]))
            try:
                rows += verify_group(subject, group, folder, same_arithmetic)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                name = Path(group[0]["image"]).with_suffix(".json")
                raise UserError(
                    f"`{name}` or one of its kind must be as `mm-cb attack` wrote it: {type(error).__name__}, {error}."
                ) from error
            task.advance(len(group))
    _show(rows, verdicts, same_arithmetic, dtype_of(loaded))
    wrong = [row for row in rows if row.disagreements]
    if wrong:
        raise UserError(
            f"`{folder / wrong[0].image}` does not hold what the run recorded: {'; '.join(wrong[0].disagreements)} "
            f"({len(wrong)} of {len(rows)} pictures disagree). Do not use its numbers; run the attack again."
        )
    check_copies(folder, artefacts)
    check_outputs(folder, artefacts, run)
    check_tries(folder, artefacts, run)
    return rows


def read_artefacts(folder: Path) -> list[dict[str, Any]]:
    """The JSON beside every attacked picture, in order; pictures without one and broken ones are an error."""
    pictures = sorted((folder / "images").glob("*/**/*.png"))
    if not pictures:
        raise UserError(f"`{folder}` must hold attacked pictures under images/, there are none to verify.")
    artefacts = []
    for picture in pictures:
        path = picture.with_suffix(".json")
        try:
            content = json.loads(path.read_bytes())
            missing = [key for key in _KEYS if key not in content]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"`{path}` must be the JSON of the picture beside it, but cannot be read: {error}"
            ) from error
        if missing:
            raise UserError(f"`{path}` must be the JSON of the picture beside it, it lacks {', '.join(missing)}.")
        if (folder / str(content["image"])).resolve() != picture.resolve():
            raise UserError(f"`{path}` must be about the picture beside it, it is about `{content['image']}`.")
        if not (folder / str(content["clean_image"])).resolve().is_relative_to((folder / "images").resolve()):
            raise UserError(f"`{path}`: `clean_image` must lie in the run, got `{content['clean_image']}`.")
        artefacts.append(content)
    return artefacts


def check_items(folder: Path, artefacts: Sequence[dict[str, Any]]) -> None:
    """Refuse items whose pictures, losses, distances or completions are not those beside the pictures.

    The numbers of a run are made from its items; a picture that was removed with its JSON is missed only there.
    """
    path, known = folder / "items.jsonl", {artefact["image"]: artefact for artefact in artefacts}
    named = set()
    for item in read_jsonl(path):
        candidates = [one for one in item.get("candidates") or () if isinstance(one, dict)]
        _check_worst(path, item, candidates)
        for one in candidates:
            if Path(str(one.get("image"))).parent.parent != Path("images"):
                continue  # a relaxation, which leaves no picture
            named.add(one["image"])
            _check_candidate(path, item, one, known.get(one["image"]))
    unnamed = sorted(known.keys() - named)
    if unnamed:
        raise UserError(f"`{path}` must name every attacked picture, it lacks `{unnamed[0]}`.")


def _check_candidate(
    path: Path, item: Mapping[str, Any], one: Mapping[str, Any], artefact: Mapping[str, Any] | None
) -> None:
    if artefact is None:
        raise UserError(f"`{path}` names `{one['image']}`, which is not in the run.")
    completion = hashlib.sha256(str(one.get("completion")).encode()).hexdigest()
    told, drawn = artefact.get("completion_sha256"), one.get("sample")
    if drawn is not None:
        told = dict(enumerate(artefact.get("samples_sha256", ()), start=1)).get(drawn)
    shared = [key for key in _SHARED if drawn is None or key != "nll_base"]
    wrong = [key for key in shared if one.get(key) != artefact.get(key)]
    wrong += ["completion"] if completion != told else []
    if drawn is None and artefact.get("prefix_emitted") != starts_with(str(one["completion"]), artefact["target"]):
        wrong.append("prefix_emitted")
    if wrong:
        raise UserError(
            f"`{path}` and the JSON beside `{one['image']}` disagree in {', '.join(wrong)}. Do not use the run's "
            "numbers; run the attack again."
        )


def _check_worst(path: Path, item: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> None:
    """An item counts as its worst candidate: harmful first, then the lowest loss.

    Another judge leaves ``prefix_emitted`` as the run had it, that of a candidate which may be the worst no longer.
    """
    if candidates:
        worst = min(candidates, key=rank)
        wrong = [key for key in ("outcome", "image", "loss", "completion") if item.get(key) != worst.get(key)]
        wrong += ["gibberish"] if item.get("gibberish") != (worst.get("outcome") == "gibberish") else []
        said = [str(one.get("completion")) for one in (candidates if "judge" in item else [worst])]
        if item.get("prefix_emitted") not in {starts_with(text, str(item.get("target"))) for text in said}:
            wrong.append("prefix_emitted")
        if wrong:
            raise UserError(
                f"`{path}`: `{item.get('id')}` under {item.get('condition')} is not the worst of its candidates, it "
                f"differs in {', '.join(wrong)}. Do not use the run's numbers; run the attack again."
            )


def check_copies(folder: Path, artefacts: Sequence[Mapping[str, Any]]) -> None:
    """Directly under images/ lie clean pictures and, per behaviour, a copy of one that was judged; nothing else."""
    judged: dict[str, set[str]] = defaultdict(set)
    for artefact in artefacts:
        judged[f"images/{safe_id(artefact['id'])}.png"].add(artefact["sha256"])
    found = {f"images/{file.name}" for file in (folder / "images").iterdir() if file.is_file()}
    for name in sorted((found | judged.keys()) - {artefact["clean_image"] for artefact in artefacts}):
        if name not in judged:
            raise UserError(f"`{folder / name}` belongs to no behaviour of this run; it was put there later.")
        if name not in found or file_sha256(folder / name) not in judged[name]:
            raise UserError(f"`{folder / name}` must be a copy of one of the behaviour's judged pictures, it is not.")


def _groups(folder: Path, artefacts: Sequence[dict[str, Any]], batch: int) -> list[list[dict[str, Any]]]:
    """Artefacts that one objective can take together: one attack, one picture size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for artefact in artefacts:
        try:
            size = read_pictures([artefact["clean_image"]], folder)[0].size
        except (OSError, ValueError) as error:
            raise UserError(f"`{folder / artefact['clean_image']}` cannot be read: {error}") from error
        groups[artefact["attack"]["name"], json.dumps(artefact["subject"]), *size].append(artefact)
    return [chunk for group in groups.values() for chunk in chunks(group, batch)]


def verify_group(
    subject: Subject, group: Sequence[dict[str, Any]], folder: Path, same_arithmetic: bool = True
) -> list[Row]:
    """Compute everything again for artefacts of one attack and one picture size.

    Greedy answers must be equal with ``same_arithmetic`` (the run's kind of device, float32); elsewhere the last digits
    of the logits may decide between two words.
    """
    problems = [_files(artefact, folder) for artefact in group]
    readable = [i for i, found in enumerate(problems) if not any("cannot be read" in text for text in found)]
    again = compute_again(subject, [group[i] for i in readable], folder) if readable else []
    found = dict(zip(readable, again, strict=True))
    rows = []
    dtype = dtype_of(subject.model)
    for i, artefact in enumerate(group):
        now = found.get(i, Again({"loss": float("nan"), "objective_file": float("nan")}, False))
        problems[i] += now.disagreements(artefact, dtype) if i in found else []
        if now.other and same_arithmetic:
            problems[i].append("the model's answer is another one than the run stored")
        loss, objective = (float(now.numbers[key] or 0) for key in ("loss", "objective_file"))
        gap = abs(objective - artefact["objective_file"])
        told = artefact["image"], artefact["epsilon"], artefact["loss"]
        rows.append(Row(*told, loss, gap, tuple(problems[i]), now.other))
    return rows


def _files(artefact: dict[str, Any], folder: Path) -> list[str]:
    """What disagrees between an artefact and its two files, without the model."""
    problems = []
    image, clean = folder / artefact["image"], folder / artefact["clean_image"]
    try:
        distance = linf_255(image, clean)
    except ImageFileError as error:
        return [f"a picture cannot be read: {error}"]
    if distance != artefact["epsilon"]:
        problems.append(f"epsilon {artefact['epsilon']}/255 recorded, {distance}/255 found")
    if distance > artefact["attack"]["epsilon"]:
        problems.append(f"epsilon {distance}/255 found, {artefact['attack']['epsilon']}/255 allowed")
    threat = Threat.parse(artefact["attack"].get("threat_model", "linf"))
    away = threat.distance(image, clean)
    if away != artefact.get("distance"):
        problems.append(f"distance {artefact.get('distance')} recorded, {away} found")
    if not threat.holds(away):
        problems.append(f"distance {away} found, {threat.limit} allowed")
    for name, path, key in (("picture", image, "sha256"), ("clean picture", clean, "clean_sha256")):
        if file_sha256(path) != artefact[key]:
            problems.append(f"the {name} is another file than the one that was judged (SHA-256)")
    if hashlib.sha256(artefact["target"].encode()).hexdigest() != artefact.get("target_sha256"):
        problems.append("the target is another text than the one that was attacked (SHA-256)")
    return problems


def _show(rows: Sequence[Row], verdicts: str, same_arithmetic: bool, dtype: str) -> None:
    from rich.table import Table

    table = Table("picture", "epsilon", "loss recorded", "loss found", "verdict")
    for row in rows:
        verdict = "; ".join(row.disagreements) or "agrees"
        table.add_row(row.image, f"{row.epsilon}/255", f"{row.loss_recorded:.5f}", f"{row.loss_found:.5f}", verdict)
    console().print(table)
    agree = sum(not row.disagreements for row in rows)
    share = "" if dtype == "float32" else f" or {tolerance(100, dtype):.2g} %, whichever is more"
    console().print(f"{agree} of {len(rows)} pictures agree ({dtype} losses to {TOLERANCE:g}{share}; epsilon exactly)")
    others = sum(row.other_answer for row in rows)
    note = "" if same_arithmetic else " (another device, or not float32: no disagreement)"
    console().print(f"{others} of {len(rows)} greedy answers differ when generated again{note}; {verdicts}")
