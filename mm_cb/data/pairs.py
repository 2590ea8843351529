"""The multimodal circuit-breaker set: picture → description → query and completion, kept answer by answer.

Every answer that was paid for is on disk before the next one is used; the same command started again asks only for
what is not there. What the generator is told comes from the user's template: none is shipped.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Required, TypedDict

from mm_cb.core.checked import read_records
from mm_cb.core.endpoint import REFUSED, UNANSWERED, Endpoint, EndpointError, EndpointFailure
from mm_cb.core.errors import UserError
from mm_cb.core.files import append_jsonl, file_sha256, text_sha256, write_bytes, write_jsonl
from mm_cb.core.records import Message
from mm_cb.core.runs import RunDirectory
from mm_cb.core.slots import refuse_other_braces
from mm_cb.data.asked import Failures, Stage, refuse_numbers, until_fit
from mm_cb.data.contamination import Contamination
from mm_cb.data.examples import SetName
from mm_cb.data.generated import GeneratedPair, parse_pair

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress

SLOT = "{description}"
_HASH = 16
"""So much of a picture's SHA-256 names it: 64 bits."""
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Describe = Callable[[Iterable[tuple[str, Path]]], Iterator[tuple[str, "str | EndpointFailure"]]]
"""Keys and files of pictures → keys and descriptions, each as soon as it is there."""


@dataclass(frozen=True)
class PairRecipe:
    """Everything that decides the set; a folder made by another recipe is refused."""

    describer: str
    generator: str
    template: str
    set: SetName = "circuit_breaker"
    limit: int | None = None
    """Use a seeded sample of so many pictures."""
    attempts: int = 3
    """Answers per picture before it is given up: refused, broken, empty or contaminated ones are asked for again."""
    max_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check template and numbers.

        Raises:
            UserError: If the template has no place for the description, or a number is out of range.
        """
        refuse_numbers(self)
        refuse_other_braces(self.template, (SLOT[1:-1],), "the template")
        if SLOT not in self.template:
            raise UserError(f"the template must hold {SLOT} where the description of a picture goes, it does not.")

    @property
    def template_sha256(self) -> str:
        """Hash of the template, for provenance."""
        return text_sha256(self.template)


class PictureFile(NamedTuple):
    """One picture; journals know it by the hash of its bytes, so a changed or moved file is never mistaken."""

    name: str
    file: Path


@dataclass
class BuiltPairs:
    """What was built.

    Attributes:
        path: The JSONL file of examples.
        pairs: How many.
        pictures: Different pictures that were to be used.
        rejected: Why answers, or pictures, were not used → how many.
        left: Why pictures have no answer yet → how many; the same command asks for them again.
        stopped: Why the endpoint was asked no further; empty if it was asked for all.
    """

    path: Path
    pairs: int = 0
    pictures: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    stopped: str = ""


def build_pairs(
    images: Path,
    out: Path,
    recipe: PairRecipe,
    *,
    describe: Describe,
    generator: Endpoint,
    behaviors: Sequence[str] = (),
    progress: "Progress | None" = None,
) -> BuiltPairs:
    """Build the set, or go on with the one that ``out`` holds.

    Args:
        images: Folder of pictures, searched with its sub-folders.
        out: Gets ``pairs.jsonl`` (training examples), ``provenance.jsonl``, ``images``, and the answers as they came.
        recipe: What to ask for.
        describe: Makes descriptions; see `mm_cb.data.describe`.
        generator: Writes query and completion as a JSON object, as the template tells it to.
        behaviors: Prompts that the model will be tested with; queries with BLEU > 0.3 against one are dropped.
        progress: Shows counts.

    Raises:
        UserError: If there are no pictures, or ``out`` belongs to another recipe.
    """
    pictures = _pictures(images, recipe)
    fields = {
        **asdict(recipe),
        "template": recipe.template_sha256,
        "behaviors": text_sha256("\0".join(behaviors)) if behaviors else "none",
    }
    with RunDirectory(out, "data build pairs", fields, recipe.seed) as run:
        built = BuiltPairs(out / "pairs.jsonl", pictures=len(pictures))
        failures = Failures("image", {key: one.name for key, one in pictures.items()}, built)
        descriptions = _describe(pictures, out / "descriptions.jsonl", recipe, describe, failures, progress)
        filter_ = Contamination(behaviors) if behaviors else None
        accepted = _generate(descriptions, out / "answers.jsonl", recipe, generator, filter_, failures, progress)
        _write(pictures, descriptions, accepted, out, recipe)
        write_jsonl(out / "failures.jsonl", failures.records)
        built.pairs = len(accepted)
        if not built.left:
            run.finish()
    return built


def _pictures(folder: Path, recipe: PairRecipe) -> dict[str, PictureFile]:
    """SHA-256 → picture, in the order of names, each content once; a seeded sample if the recipe limits them."""
    if not folder.is_dir():
        raise UserError(f"`--images` must be a folder of pictures, got `{folder}`.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _ENDINGS and file.is_file())
    if recipe.limit is not None and recipe.limit < len(files):
        files = sorted(random.Random(f"pictures {recipe.seed}").sample(files, recipe.limit))
    if not files:
        raise UserError(f"`{folder}` must hold pictures ({', '.join(sorted(_ENDINGS))}), it holds none.")
    pictures: dict[str, PictureFile] = {}
    for file in files:
        pictures.setdefault(file_sha256(file), PictureFile(file.relative_to(folder).as_posix(), file))
    return pictures


class PictureReply(TypedDict, total=False):
    """One line of a journal: what was said to a picture, or why nothing was."""

    image_sha256: Required[str]
    description: str
    answer: str
    refused: str


def _describe(
    pictures: dict[str, PictureFile],
    journal: Path,
    recipe: PairRecipe,
    describe: Describe,
    failures: Failures,
    progress: "Progress | None",
) -> dict[str, str]:
    """Descriptions of all pictures, those of earlier runs read back; each is asked for once a run."""
    records = [record for record in read_records(journal, PictureReply) if record["image_sha256"] in pictures]
    held = {record["image_sha256"]: record["description"] for record in records if "description" in record}
    refusals = Counter(record["image_sha256"] for record in records if REFUSED in record)
    given_up = {key for key, count in refusals.items() if key not in held and count >= recipe.attempts}
    for record in records:
        if record["image_sha256"] in given_up:
            failures.reject(record["image_sha256"], "description", record["refused"])
    missing = [(key, picture.file) for key, picture in pictures.items() if key not in held and key not in given_up]
    task = progress.task("describe", len(pictures), done=len(pictures) - len(missing)) if progress else None
    left = len(missing)
    try:
        for key, answer in describe(missing):
            left -= 1
            if isinstance(answer, EndpointFailure):
                if answer.kind in UNANSWERED:
                    append_jsonl(journal, {"image_sha256": key, REFUSED: answer.reason})
                failures.add(key, "description", answer)
            else:
                append_jsonl(journal, {"image_sha256": key, "description": answer})
                held[key] = answer
            if task:
                task.advance()
    except EndpointError as error:
        failures.stop("description", left, error)
    empty = sum(not held[key].strip() for key in pictures if key in held)
    failures.built.rejected.update({"empty description": empty} if empty else {})
    return {key: held[key] for key in pictures if held.get(key, "").strip()}


def _generate(
    descriptions: dict[str, str],
    journal: Path,
    recipe: PairRecipe,
    generator: Endpoint,
    contamination: Contamination | None,
    failures: Failures,
    progress: "Progress | None",
) -> dict[str, tuple[GeneratedPair, int]]:
    """Accepted pairs with the number of the attempt that gave them."""

    def read(_: str, answer: str) -> GeneratedPair | str:
        pair = parse_pair(answer)
        near = isinstance(pair, GeneratedPair) and contamination is not None and contamination.match(pair.query)
        return "contaminated by a behaviour" if near else pair

    requests = {key: _request(recipe.template, text) for key, text in descriptions.items()}
    limits = recipe.attempts, recipe.max_tokens, recipe.temperature
    stage = Stage("answer", "generate", journal, PictureReply, "image_sha256", *limits)
    return until_fit(requests, stage, generator, read, failures, progress)


def _request(template: str, description: str) -> list[Message]:
    return [{"role": "user", "content": template.replace(SLOT, description)}]


def _write(
    pictures: dict[str, PictureFile],
    descriptions: dict[str, str],
    accepted: dict[str, tuple[GeneratedPair, int]],
    out: Path,
    recipe: PairRecipe,
) -> None:
    """The examples in the pictures' order, their pictures, and where each of them comes from.

    Copies and ids are named by content: a picture that was replaced never passes for the one that was described. The
    set is in the id, so that both sets may be built from one folder and trained together.
    """
    examples, origins = [], []
    for key, (name, file) in pictures.items():
        if key not in accepted:
            continue
        (query, completion), attempt = accepted[key]
        id = f"{recipe.set}-{key[:_HASH]}"
        copy = f"images/{key[:_HASH]}{file.suffix.lower()}"
        if not (out / copy).is_file():
            write_bytes(out / copy, file.read_bytes())
        content = [{"type": "image"}, {"type": "text", "text": query}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": completion}]
        examples.append({"id": id, "messages": messages, "images": [copy], "set": recipe.set, "source": "built pairs"})
        origins.append(
            {
                "id": id,
                "image": name,
                "image_sha256": key,
                "description": descriptions[key],
                "describer": recipe.describer,
                "generator": recipe.generator,
                "template_sha256": recipe.template_sha256,
                "attempt": attempt,
            }
        )
    write_jsonl(out / "pairs.jsonl", examples)
    write_jsonl(out / "provenance.jsonl", origins)
