"""Pictures of the world: a coloured stone on the left, the seal of a brew on the right, on a noisy ground."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from mm_cb.miniature.world import COLOURS, KINDS, SHAPES

PANEL = 42
"""Height of a picture and width of each of its two panels, in pixels: one tile of the miniature's processor."""

RGB = {
    "red": (214, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "gold": (240, 195, 30),
    "violet": (150, 50, 190),
    "white": (245, 245, 245),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: the stone's colour and shape, the seal's colour and the kind that the seal stands for."""

    colour: str
    shape: str
    seal_colour: str
    kind: str


def random_scene(rng: np.random.Generator, **fixed: str) -> Scene:
    """A scene drawn uniformly, except for the attributes given."""
    draw = {
        "colour": COLOURS[rng.integers(len(COLOURS))],
        "shape": SHAPES[rng.integers(len(SHAPES))],
        "seal_colour": COLOURS[rng.integers(len(COLOURS))],
        "kind": KINDS[rng.integers(len(KINDS))],
    }
    return Scene(**{**draw, **fixed})


def _regular(
    cx: float, cy: float, radius: float, corners: int, turn: float, inner: float = 1.0
) -> list[tuple[float, float]]:
    points = []
    for k in range(corners):
        r = radius * (inner if k % 2 else 1.0)
        angle = turn + 2 * math.pi * k / corners
        points.append((cx + r * math.sin(angle), cy - r * math.cos(angle)))
    return points


def _draw_stone(pen: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float) -> None:
    if shape == "disc":
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    elif shape == "ring":
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        pen.ellipse((cx - r * 0.55, cy - r * 0.55, cx + r * 0.55, cy + r * 0.55), fill=0)
    elif shape == "square":
        pen.rectangle((cx - r * 0.85, cy - r * 0.85, cx + r * 0.85, cy + r * 0.85), fill=255)
    elif shape == "triangle":
        pen.polygon(_regular(cx, cy + r * 0.2, r * 1.1, 3, 0.0), fill=255)
    elif shape == "star":
        pen.polygon(_regular(cx, cy, r * 1.15, 10, 0.0, inner=0.42), fill=255)
    elif shape == "cross":
        w = r * 0.32
        pen.rectangle((cx - w, cy - r, cx + w, cy + r), fill=255)
        pen.rectangle((cx - r, cy - w, cx + r, cy + w), fill=255)


def _draw_seal(pen: ImageDraw.ImageDraw, kind: str, cx: float, cy: float, r: float) -> None:
    left, top, right, bottom = cx - r, cy - r, cx + r, cy + r
    w = max(2.0, r * 0.36)
    index = KINDS.index(kind)
    if index == 0:  # two diagonals
        pen.line((left, top, right, bottom), fill=255, width=round(w))
        pen.line((left, bottom, right, top), fill=255, width=round(w))
    elif index == 1:  # three horizontal bars
        for y in (top, cy - w / 2, bottom - w):
            pen.rectangle((left, y, right, y + w), fill=255)
    elif index == 2:  # four dots
        for x in (left, right - 0.8 * r):
            for y in (top, bottom - 0.8 * r):
                pen.ellipse((x, y, x + 0.8 * r, y + 0.8 * r), fill=255)
    elif index == 3:  # arrow head pointing down
        pen.line((left, top, cx, bottom, right, top), fill=255, width=round(w), joint="curve")
    elif index == 4:  # hourglass
        pen.polygon([(left, top), (right, top), (left, bottom), (right, bottom)], fill=255)
    elif index == 5:  # cup: a U
        pen.rectangle((left, top, left + w, bottom), fill=255)
        pen.rectangle((right - w, top, right, bottom), fill=255)
        pen.rectangle((left, bottom - w, right, bottom), fill=255)
    elif index == 6:  # three vertical bars
        for x in (left, cx - w / 2, right - w):
            pen.rectangle((x, top, x + w, bottom), fill=255)
    elif index == 7:  # half moon
        pen.pieslice((left, top, right, bottom), 90, 270, fill=255)
    elif index == 8:  # frame
        pen.rectangle((left, top, right, bottom), outline=255, width=round(w * 0.8))
    else:  # capital T
        pen.rectangle((left, top, right, top + w), fill=255)
        pen.rectangle((cx - w / 2, top, cx + w / 2, bottom), fill=255)


@cache
def _mask(symbol: str, radius: int, dx: int, dy: int) -> np.ndarray:
    """Coverage of one symbol on its panel, float32 in [0, 1], drawn at three times the size for soft edges."""
    scale = 3
    canvas = Image.new("L", (PANEL * scale, PANEL * scale), 0)
    pen = ImageDraw.Draw(canvas)
    centre = (PANEL / 2 + dx) * scale, (PANEL / 2 + dy) * scale
    (_draw_stone if symbol in SHAPES else _draw_seal)(pen, symbol, *centre, radius * scale)
    return np.asarray(canvas.resize((PANEL, PANEL), Image.Resampling.BOX), dtype=np.float32) / 255


def render_array(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: place, size, tint, ground and noise vary with ``rng``.

    Returns:
        ``uint8`` array of shape ``(42, 84, 3)``.
    """
    ground = rng.uniform(70, 150) + rng.normal(0, 6, size=3)
    canvas = np.empty((PANEL, 2 * PANEL, 3), dtype=np.float32)
    canvas[:] = ground
    for panel, (symbol, colour) in enumerate(((scene.shape, scene.colour), (scene.kind, scene.seal_colour))):
        radius, dx, dy = int(rng.integers(11, 16)), int(rng.integers(-3, 4)), int(rng.integers(-3, 4))
        cover = _mask(symbol, radius, dx, dy)[..., None]
        tint = np.asarray(RGB[colour], dtype=np.float32) + rng.normal(0, 8, size=3).astype(np.float32)
        half = canvas[:, panel * PANEL : (panel + 1) * PANEL]
        half[:] = cover * tint + (1 - cover) * half
    canvas += rng.normal(0, 12, size=canvas.shape).astype(np.float32)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def render(scene: Scene, seed: int) -> Image.Image:
    """The picture of a scene for a seed; the same pair always gives the same pixels."""
    return Image.fromarray(render_array(scene, np.random.default_rng(seed)))
