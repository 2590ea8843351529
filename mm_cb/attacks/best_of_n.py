"""Best of N: many random variations of a picture, or of the text beside it, and no gradient: one of them may do.

Nothing is shipped: picture and text are the behaviour's own.

Source:
    Best-of-N jailbreaking (Hughes et al. 2024, arXiv:2412.03556): the text's variations as published (words scrambled,
    letters' case, single characters moved, with its probabilities). Deviations: the picture is the behaviour's own,
    where theirs is the request written on coloured boxes, so that its variations are crop, turn, colour and noise; the
    answer to each is greedy unless ``--samples`` are drawn beside it, theirs is drawn at temperature 1.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mm_cb.data.behaviors_file import Behavior

_CROP, _TURN, _GAIN, _SHIFT, _NOISE = 0.5, 45.0, 0.5, 64.0, 32.0
"""At strength 1: largest share cut off a side, largest angle in degrees, spread of contrast and of brightness (in
255ths) per channel, standard deviation of the noise (in 255ths). Our choice."""
_PRINTABLE = range(32, 127)


def varied(
    behavior: Behavior, picture: Image.Image, *, vary: str, strength: float, seed: int, draw: int
) -> tuple[Image.Image, str]:
    """One variation of a behaviour's chat: its picture and its prompt; at strength 0 both are as they were.

    Args:
        behavior: What is asked.
        picture: Its clean picture, RGB.
        vary: ``"picture"``, ``"text"`` or ``"both"``.
        strength: From 0 to 1.
        seed: Of the run.
        draw: Which variation; with seed and behaviour it decides everything random.
    """
    image, prompt = picture, behavior.prompt
    if vary in ("picture", "both"):
        image = vary_picture(image, strength, _random(behavior, seed, draw, 0))
    if vary in ("text", "both"):
        prompt = vary_text(prompt, strength, _random(behavior, seed, draw, 1))
    return image, prompt


def vary_picture(picture: Image.Image, strength: float, random: np.random.Generator) -> Image.Image:
    """The picture cut, turned, coloured and with noise on it, at its own size."""
    if not strength:
        return picture
    (width, height), share = picture.size, 1 - strength * _CROP * random.random()
    left, top = ((1 - share) * side * random.random() for side in (width, height))
    window = left, top, left + share * width, top + share * height
    angle = strength * _TURN * random.uniform(-1, 1)
    moved = picture.resize(picture.size, Image.Resampling.BILINEAR, box=window)
    moved = moved.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    gain, shift = 1 + strength * _GAIN * random.uniform(-1, 1, 3), strength * _SHIFT * random.uniform(-1, 1, 3)
    values = (np.asarray(moved, dtype=np.float64) - 128) * gain + 128 + shift
    values += strength * _NOISE * random.standard_normal(values.shape)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def vary_text(text: str, strength: float, random: np.random.Generator) -> str:
    """The text with words scrambled, letters in the other case and characters moved by one in ASCII; blanks stay.

    A word's middle is shuffled and a letter's case changed with probability √strength each, a character moved with
    probability strength³.
    """
    words = []
    for word in text.split(" "):
        letters = list(word)
        if len(letters) > 3 and random.random() < strength**0.5:
            middle = letters[1:-1]
            random.shuffle(middle)
            letters[1:-1] = middle
        words.append("".join(_moved(letter, strength, random) for letter in letters))
    return " ".join(words)


def _moved(letter: str, strength: float, random: np.random.Generator) -> str:
    flip, move, step = random.random(3)
    if flip < strength**0.5 and len(letter.swapcase()) == 1:
        letter = letter.swapcase()
    near = ord(letter) + (1 if step < 0.5 else -1)
    return chr(near) if move < strength**3 and ord(letter) in _PRINTABLE and near in _PRINTABLE else letter


def _random(behavior: Behavior, *key: int) -> np.random.Generator:
    return np.random.default_rng([*key, *behavior.id.encode()])
