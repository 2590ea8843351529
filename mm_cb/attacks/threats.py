"""What an attacker may change of a picture: the norms of ``--norm``, their sets of pictures, and measures of a file.

Imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mm_cb.core.limits import plain

NORMS = {
    "linf": "every value, by at most --epsilon",
    "l2": "a change of Euclidean norm at most --epsilon, pixels in [0, 1]",
    "patch": "a square of --patch-size pixels in the upper left corner",
    "border": "a frame of --border-width pixels",
    "blank": "the whole picture, drawn from mid-grey instead of the clean one",
}
"""The names of ``--norm``, and what of a picture may change."""

_FAR = 16
"""How far outside an l-2 ball its placebo is drawn, in radii, before it is brought to the surface."""
_LEVELS = 255


@dataclass(frozen=True)
class Threat:
    """What of a picture may change, and how far."""

    norm: str = "linf"
    levels: int = 32
    """Largest change of a value, in 255ths; 255 where single values are not bounded (``l2``, ``blank``)."""
    size: float = 0.0
    """The radius of ``l2``; the pixels of ``patch`` and ``border``."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.norm not in NORMS:
            raise ValueError(f"`norm` must be one of {', '.join(NORMS)}, got {self.norm!r}.")
        for name, kinds, what in (("levels", int, "a whole number of 255ths"), ("size", int | float, "a number")):
            held = getattr(self, name)
            if isinstance(found := plain(held), bool) or not isinstance(found, kinds):
                raise TypeError(f"`{name}` of a threat must be {what}, got {held!r:.60} ({type(held).__name__}).")
            object.__setattr__(self, name, found)
        if not 0 <= self.levels <= _LEVELS:
            raise ValueError(f"`epsilon` must lie in 0..255 (255ths), got {self.levels}.")
        if self.whole_range and self.levels != _LEVELS:
            raise ValueError(f"`{self.norm}` bounds no single value: its `levels` must be 255, got {self.levels}.")
        if (self.norm in ("l2", "patch", "border")) is not (0 < self.size < math.inf):
            raise ValueError(f"the size of `{self.norm}` must be above 0 and finite, got {self.size:g}.")
        if self.norm != "l2" and self.size != int(self.size):
            raise ValueError(f"the size of `{self.norm}` must be a whole number of pixels, got {self.size:g}.")

    @classmethod
    def read(cls, text: str | None, levels: int) -> Threat:
        """From what files hold: ``linf``, ``l2:8``, ``patch:24``, ``border:4`` or ``blank``, and the 255ths beside it.

        Raises:
            ValueError: If the text is none of these.
        """
        norm, _, size = (text or "linf").partition(":")
        return cls(norm, levels, float(size or 0))

    @property
    def text(self) -> str:
        """As files hold it: ``"l2:8"``."""
        return f"{self.norm}:{self.size:g}" if self.size else self.norm

    @property
    def epsilon(self) -> float:
        """Largest change of a value in [0, 1] units."""
        return self.levels / _LEVELS

    @property
    def whole_range(self) -> bool:
        """Whether single values are not bounded."""
        return self.norm in ("l2", "blank")

    @property
    def limit(self) -> float | None:
        """Largest `distance` of a file; None where the largest change of a value says all."""
        return {"l2": self.size, "patch": 0.0, "border": 0.0}.get(self.norm)

    def holds(self, distance: float | None) -> bool:
        """Whether a file at this `distance` is allowed."""
        return distance == self.limit or (distance is not None and distance <= (self.limit or 0.0) + 1e-6)

    def allowed(self, size: tuple[int, int]) -> Any:
        """The set of pictures of ``size`` (height, width), as a threat model of `image_attacks`.

        Raises:
            ValueError: If the set does not fit the picture.
        """
        from image_attacks import FileL2, Linf, Patch, Unconstrained

        ball = Linf(self.epsilon)
        inside = Unconstrained() if self.levels == _LEVELS else ball
        if self.norm == "l2":
            most = math.sqrt(3 * size[0] * size[1])
            if self.size > most:
                raise ValueError(f"no two pictures of that size are further apart than {most:.1f}")
            return FileL2(self.size)
        if self.norm == "patch":
            return Patch.rectangle(size, (0, 0), (int(self.size), int(self.size)), inside)
        if self.norm == "border":
            return Patch.border(size, int(self.size), inside)
        return Unconstrained(0.5) if self.norm == "blank" else ball

    def placebo(self, clean: Any, generators: Any) -> Any:
        """Noise as large as an attack may be, moved into the set: random signs, in an l-2 ball a random direction.

        Signs are all of one size, so in a small ball none of them survives rounding; of normal numbers the largest do.

        Args:
            clean: Clean pixels ``(B, 3, H, W)``.
            generators: One random stream per picture.
        """
        from image_attacks import sign_noise

        allowed = self.allowed((clean.shape[2], clean.shape[3]))
        if self.norm == "l2":
            return allowed.project(clean + _FAR * (allowed.random_start(clean, generators) - clean), clean)
        return allowed.project(sign_noise(clean, self.epsilon, generators), clean)

    def distance(self, levels: Any) -> float | None:
        """How far a picture is from the clean one in this threat's own measure; None where it has none.

        ``l2``: Euclidean norm in [0, 1] units. ``patch``, ``border``: largest change outside, in 255ths.

        Args:
            levels: Differences in whole levels, ``(3, H, W)``.
        """
        if self.limit is None:
            return None
        if self.norm == "l2":
            return round(float(levels.double().norm()) / _LEVELS, 6)
        mask = self.allowed((levels.shape[1], levels.shape[2])).mask
        return float((levels.abs() * ~mask).max())
