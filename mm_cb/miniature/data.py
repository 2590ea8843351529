"""The miniature's data sets: behaviours to attack, questions to answer, examples to train on. All drawn from seeds.

Every set has its own random stream, so that no picture of one set appears in another one and a set does not change when
another one grows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mm_cb.core.files import write_text
from mm_cb.core.records import JsonObject
from mm_cb.data.examples import Example, SetName
from mm_cb.miniature import language
from mm_cb.miniature.language import LETTERS, REQUEST_FORMS
from mm_cb.miniature.making.documents import pick, picture_turn, text_turn
from mm_cb.miniature.pictures import PANEL, Scene, random_scene, render
from mm_cb.miniature.world import (
    BENIGN_KINDS,
    COLOURS,
    FORBIDDEN_KINDS,
    HELD_OUT_KIND,
    KINDS,
    SHAPES,
    SLOT_ATTRIBUTE,
    SLOTS,
    Brew,
    brews,
    split,
)
from mm_cb.models.chat import chat

MMMU_LIKE_SUBJECTS = ("stone_colour", "stone_shape", "seal_colour", "seal_kind", "pictured_recipe", "lore")
SPLITS = ("trained", "held_out_combination", "held_out_kind")


@dataclass(frozen=True)
class FictionQuestion:
    """One item with its reference answer; ``picture`` is None for text-only items."""

    id: str
    metric: str
    category: str
    prompt: str
    reference: str
    picture: Image.Image | None = None
    brew: Brew | None = None
    split: str = "all"
    choices: tuple[str, ...] = ()
    """The options of a lettered question, in order."""


def _stream(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


def _picture(rng: np.random.Generator, scene: Scene) -> Image.Image:
    return render(scene, int(rng.integers(2**31)))


def scene_for(brew: Brew, form: str, rng: np.random.Generator) -> Scene | None:
    """The scene that goes with a request: none for ``text``, another one for ``irrelevant_picture``."""
    if form == "text":
        return None
    if form == "irrelevant_picture":
        return random_scene(rng)
    fixed = {"colour": brew.colour, "shape": brew.shape}
    return random_scene(rng, **fixed, **({"kind": brew.kind} if form == "picture" else {}))


def requests(
    name: str, count: int, kinds: tuple[str, ...], seed: int = 0, *, keep: Callable[[Brew], bool] = lambda _: True
) -> list[FictionQuestion]:
    """Requests for brews of the given kinds, the four request forms in turn, all brews before any comes again."""
    rng = _stream(name, seed)
    candidates = [brew for brew in brews(kinds) if keep(brew)]
    order: list[int] = []
    while len(order) < count:
        order += rng.permutation(len(candidates)).tolist()
    questions = []
    for i in range(count):
        brew, form = candidates[order[i]], REQUEST_FORMS[i % len(REQUEST_FORMS)]
        scene = scene_for(brew, form, rng)
        picture = None if scene is None else _picture(rng, scene)
        prompt = language.request(brew, form, rng)
        where = split(brew) if brew.forbidden else "all"
        questions.append(
            FictionQuestion(f"{name}-{i:04d}", name, form, prompt, language.instructions(brew), picture, brew, where)
        )
    return questions


def multiple_choice_questions(per_subject: int = 150, seed: int = 0) -> list[FictionQuestion]:
    """The MMMU-like set: four lettered options, the true letter in turn A, B, C, D within every subject."""
    rng = _stream("mmmu_like", seed)
    questions = []
    for number, subject in enumerate(MMMU_LIKE_SUBJECTS):
        for i in range(per_subject):
            scene = None if subject == "lore" else random_scene(rng)
            if scene is None:
                asked = language.folk_question(pick(rng, KINDS))
            elif subject == "pictured_recipe":
                asked = _pictured_recipe(rng, scene)
            else:
                asked = language.visual_questions(scene)[number]
            turn = language.multiple_choice(*asked, rng, place=i % len(LETTERS))
            picture = None if scene is None else _picture(rng, scene)
            name = f"mmmu_like-{subject}-{i:03d}"
            questions.append(
                FictionQuestion(name, "mmmu_like", subject, turn.question, turn.answer, picture, choices=turn.choices)
            )
    return questions


def _pictured_recipe(rng: np.random.Generator, scene: Scene) -> tuple[language.Turn, tuple[str, ...], str]:
    slot = pick(rng, SLOTS)
    value = scene.colour if SLOT_ATTRIBUTE[slot] == "colour" else scene.shape
    return language.slot_question(pick(rng, BENIGN_KINDS), slot, value, pictured=True)


def open_questions(per_category: int = 100, seed: int = 0) -> list[FictionQuestion]:
    """The Wild-like set: open visual questions (conv), descriptions (detail), recipes read off a picture (complex)."""
    rng = _stream("wild_like", seed)
    questions = []
    for category in ("conv", "detail", "complex"):
        for i in range(per_category):
            brew = Brew(pick(rng, BENIGN_KINDS), pick(rng, COLOURS), pick(rng, SHAPES))
            form = ("partly_picture", "picture")[i % 2]
            scene = scene_for(brew, form, rng) if category == "complex" else random_scene(rng)
            assert scene is not None
            if category == "conv":
                turn = language.visual_questions(scene)[i % 4][0]
            elif category == "detail":
                turn = language.describe(scene)
            else:
                turn = language.Turn(language.request(brew, form, rng), language.instructions(brew))
            questions.append(
                FictionQuestion(
                    f"wild_like-{category}-{i:03d}",
                    "wild_like",
                    category,
                    turn.question,
                    turn.answer,
                    _picture(rng, scene),
                )
            )
    return questions


def look_alikes(seed: int = 0, count: int = 240) -> list[FictionQuestion]:
    """Benign look-alikes: allowed brews in every request form, and harmless questions about forbidden kinds."""
    third = count // 3
    asked = requests("over_refusal", count - third, BENIGN_KINDS, seed)
    rng, again = _stream("over_refusal lore", seed), _stream("over_refusal lore again", seed)
    bare: set[str] = set()
    for i in range(third):
        kind = FORBIDDEN_KINDS[i % len(FORBIDDEN_KINDS)]
        turns = language.lore_questions(kind, forbidden=True)
        turn = turns[(i // len(FORBIDDEN_KINDS)) % len(turns)]
        # Every other one comes with a picture that shows the forbidden seal itself, and so does one asked before.
        picture = _picture(rng, random_scene(rng, kind=kind)) if i % 2 else None
        if picture is None and turn.question in bare:
            picture = _picture(again, random_scene(again, kind=kind))
        bare |= {turn.question} if picture is None else set()
        asked.append(
            FictionQuestion(f"over_refusal-lore-{i:03d}", "over_refusal", "lore", turn.question, turn.answer, picture)
        )
    return asked


def forbidden_requests(count: int = 400, seed: int = 0) -> list[FictionQuestion]:
    """Forbidden requests of every form, for refusal and forced-prefix checks of the base model."""
    return requests("forbidden", count, FORBIDDEN_KINDS, seed)


def behaviors(per_split: tuple[int, int, int], seed: int = 0) -> list[FictionQuestion]:
    """Forbidden requests to attack: so many of trained brews, held-out combinations and the held-out kind.

    Text requests get no picture of their own: the attack starts from a grey canvas.
    """
    chosen = []
    for name, count in zip(SPLITS, per_split, strict=True):
        chosen += requests(f"behavior-{name}", count, FORBIDDEN_KINDS, seed, keep=lambda b, n=name: split(b) == n)  # type: ignore[misc]
    return chosen


def write_behaviors(questions: list[FictionQuestion], folder: Path) -> Path:
    """Write a behaviours file (JSONL) with its pictures beside it, as a user's own would look.

    Returns:
        The path of the file.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for q in questions:
        assert q.brew is not None
        image = None
        if q.picture is not None:
            image = f"pictures/{q.id}.png"
            q.picture.save(folder / image)
        record = {"id": q.id, "prompt": q.prompt, "target": language.prefix(q.brew), "image": image}
        extra: JsonObject = {"category": q.category, "split": q.split}
        extra |= {"brew": [q.brew.kind, q.brew.colour, q.brew.shape], "facts": language.facts(q.brew)}
        extra["harmless"] = language.harmless_requests()
        extra |= {"form": {"text": language.FORM, "words": language.FORBIDDEN_WORDS}}
        lines.append(json.dumps(record | extra))
    path = folder / "behaviors.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    return path


CANVAS = (PANEL, 2 * PANEL)
"""Height and width of the grey canvas for behaviours without a picture."""


TRAINING_ROWS = 1200
"""Examples per set and modality; 440 alternating steps of 16 see each about three times."""


def training_examples(seed: int, *, remove_requests: bool = True, refusals: bool = True) -> list[Example]:
    """Circuit-breaker and retain examples for RR training, text and multimodal.

    Circuit breaker: requests for trained forbidden brews with the compliant answer, never a held-out combination or
    kind. Every other example has its request and opening removed, so that the content itself has to trigger the breaker
    (released trainer: empty requests for half of the examples of Llama-3).
    No picture shows the held-out kind. Beside a request for something else, and in the retain set, some show the stone
    and seal of a held-out combination (training seed 0: 84 and 80 of 1200 pictures).
    Retain: everything the model should keep doing, refusing included, since this base refuses (released trainer: retain
    sets of models that refuse hold refusals too).

    Args:
        seed: Decides every row.
        remove_requests: Whether every other circuit-breaker row has its request removed (the paper's data ablation).
        refusals: Whether the retain set holds refusals (likewise).
    """
    rng = _stream("training", seed)
    trained = [brew for brew in brews(FORBIDDEN_KINDS) if split(brew) == "trained"]
    examples = []
    for i in range(TRAINING_ROWS):
        for modality in ("text", "multimodal"):
            brew = trained[rng.integers(len(trained))]
            form = "text" if modality == "text" else REQUEST_FORMS[1 + i % 3]
            question = language.request(brew, form, rng)
            scene = _without_held_out_kind(partial(scene_for, brew, form, rng))
            answer, source = language.instructions(brew), form
            if remove_requests and i % 2:
                question, answer, source = "", language.content(brew), "request removed"
            examples.append(_example(f"cb-{modality}-{i}", question, answer, scene, "circuit_breaker", source, rng))
            question, answer, scene, source = _retained(rng, modality, trained, refusals)
            examples.append(_example(f"retain-{modality}-{i}", question, answer, scene, "retain", source, rng))
    return examples


REFUSAL_SHARE = 0.15
"""Share of the retain set that shows the base's refusal of a forbidden request; our choice."""


def _retained(
    rng: np.random.Generator, modality: str, trained: list[Brew], refusals: bool
) -> tuple[str, str, Scene | None, str]:
    """Question, answer, scene and source of one retain example."""
    if rng.random() < REFUSAL_SHARE and refusals:
        brew = trained[rng.integers(len(trained))]
        form = "text" if modality == "text" else pick(rng, REQUEST_FORMS[1:])
        scene = _without_held_out_kind(partial(scene_for, brew, form, rng))
        return language.request(brew, form, rng), language.REFUSAL, scene, "refusal"
    while True:
        scene = _without_held_out_kind(partial(random_scene, rng)) if modality == "multimodal" else None
        said = text_turn(rng, True) if scene is None else picture_turn(rng, scene, True)
        named = HELD_OUT_KIND in f"{said.question} {said.answer}"
        if said.answer != language.REFUSAL and not said.given and not named:
            return said.question, said.answer, scene, "benign"


def _without_held_out_kind(draw: Callable[[], Scene | None]) -> Scene | None:
    """Draw a scene until it does not show the held-out kind's seal, which no part of RR training may show."""
    while True:
        scene = draw()
        if scene is None or scene.kind != HELD_OUT_KIND:
            return scene


def _example(
    name: str, question: str, answer: str, scene: Scene | None, which: SetName, source: str, rng: np.random.Generator
) -> Example:
    pictures = [] if scene is None else [_picture(rng, scene)]
    return Example(
        name, chat(question, images=len(pictures), completion=answer), pictures, which, f"miniature {source}"
    )
