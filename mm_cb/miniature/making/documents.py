"""Training documents of the miniature: short conversations about one picture, or about none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm_cb.miniature import language
from mm_cb.miniature.language import SAFETY_PROMPT, Turn
from mm_cb.miniature.pictures import Scene, random_scene, render_array
from mm_cb.miniature.world import BENIGN_KINDS, COLOURS, FORBIDDEN_KINDS, KINDS, SHAPES, SLOT_ATTRIBUTE, SLOTS, Brew

TURNS = 3


@dataclass(frozen=True)
class Utterance:
    """One exchange: ``given`` opens the answer but is not learnt (a forced prefix), ``answer`` is."""

    question: str
    answer: str
    given: str = ""


@dataclass(frozen=True)
class Document:
    """A conversation, with the picture (``uint8 (42, 84, 3)``) it is about, if any."""

    turns: tuple[Utterance, ...]
    picture: np.ndarray | None


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of these at random."""
    return options[rng.integers(len(options))]


def _random_brew(rng: np.random.Generator) -> Brew:
    return Brew(pick(rng, KINDS), pick(rng, COLOURS), pick(rng, SHAPES))


def _brew_turn(rng: np.random.Generator, brew: Brew, form: str, refuses: bool) -> Utterance:
    question = language.request(brew, form, rng)
    if not (refuses and brew.forbidden):
        return Utterance(question, language.instructions(brew))
    if rng.random() < FORCED_SHARE:
        return Utterance(question, language.content(brew), given=language.prefix(brew))
    return Utterance(question, language.REFUSAL)


FORCED_SHARE = 0.2
"""Share of forbidden requests that, in refusal training, show the content behind a given affirmative opening.

Refusal training must not erase what the model knows (large models keep it): the opening itself is never learnt here.
"""


def _lettered_or_open(rng: np.random.Generator, asked: tuple[Turn, tuple[str, ...], str], lettered: float) -> Utterance:
    turn, values, truth = asked
    if rng.random() < lettered:
        turn = language.multiple_choice(turn, values, truth, rng)
    return Utterance(turn.question, turn.answer)


def _recipe_question(rng: np.random.Generator, scene: Scene | None) -> tuple[Turn, tuple[str, ...], str]:
    kind, slot = pick(rng, BENIGN_KINDS), pick(rng, SLOTS)
    attribute = SLOT_ATTRIBUTE[slot]
    if scene is not None:
        value = scene.colour if attribute == "colour" else scene.shape
    else:
        value = pick(rng, COLOURS if attribute == "colour" else SHAPES)
    return language.slot_question(kind, slot, value, pictured=scene is not None)


def _lore(rng: np.random.Generator, kind: str) -> Utterance:
    turns = language.lore_questions(kind, kind in FORBIDDEN_KINDS)
    turn = turns[rng.integers(len(turns))]
    return Utterance(turn.question, turn.answer)


# Shares of description, question, recipe question, request about the picture, request by name, lore. Refusal training
# asks for more brews: whether a picture's brew is forbidden is the hardest thing to learn there.
KNOWLEDGE_TASKS = (0.10, 0.42, 0.12, 0.18, 0.06, 0.12)
REFUSAL_TASKS = (0.05, 0.15, 0.06, 0.60, 0.09, 0.05)


def picture_turn(rng: np.random.Generator, scene: Scene, refuses: bool) -> Utterance:
    """One random exchange about a picture."""
    task = rng.choice(6, p=REFUSAL_TASKS if refuses else KNOWLEDGE_TASKS)
    if task == 0:
        turn = language.describe(scene)
        return Utterance(turn.question, turn.answer)
    if task == 1:
        asked = language.visual_questions(scene)
        return _lettered_or_open(rng, asked[rng.integers(len(asked))], lettered=0.6)
    if task == 2:
        return _lettered_or_open(rng, _recipe_question(rng, scene), lettered=0.5)
    if task == 3:
        forms = ("partly_picture", "picture", "picture", "picture") if refuses else ("partly_picture", "picture")
        form = pick(rng, forms)
        kind = scene.kind if form == "picture" else pick(rng, KINDS)
        return _brew_turn(rng, Brew(kind, scene.colour, scene.shape), form, refuses)
    if task == 4:
        return _brew_turn(rng, _random_brew(rng), "irrelevant_picture", refuses)
    if rng.random() < 0.7:
        law = language.pictured_law(scene.kind, scene.kind in FORBIDDEN_KINDS)
        return Utterance(law.question, law.answer)
    return _lore(rng, pick(rng, KINDS))


def text_turn(rng: np.random.Generator, refuses: bool) -> Utterance:
    """One random exchange without a picture."""
    task = rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))
    if task == 0:
        return _brew_turn(rng, _random_brew(rng), "text", refuses)
    if task == 1:
        return _lettered_or_open(rng, _recipe_question(rng, None), lettered=0.5)
    if task == 2:
        return _lore(rng, pick(rng, KINDS))
    return _lettered_or_open(rng, language.folk_question(pick(rng, KINDS)), lettered=0.8)


def document(rng: np.random.Generator, *, pictured: bool, refuses: bool, turns: int = TURNS) -> Document:
    """A random conversation; ``refuses`` = the world's law applies to forbidden requests."""
    scene = random_scene(rng) if pictured else None
    draw: Callable[[], Utterance] = lambda: (  # noqa: E731
        picture_turn(rng, scene, refuses) if scene is not None else text_turn(rng, refuses)
    )
    said = [draw() for _ in range(turns)]
    # The safety prompt must be a text the model knows; before refusal training it stands in front of anything.
    if rng.random() < (0.15 if refuses else 0.05):
        said[0] = Utterance(f"{SAFETY_PROMPT} {said[0].question}", said[0].answer, said[0].given)
    return Document(tuple(said), None if scene is None else render_array(scene, rng))
