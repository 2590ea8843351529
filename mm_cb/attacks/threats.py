"""What an attacker may change: the values of ``threat_model=``, with their sets of pictures and measures of a file.

The largest change of a value, ``--epsilon``, holds in every one of them. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEANINGS = {
    "linf": "every value",
    "l2:R": "a change of Euclidean norm at most R over all values in [0, 1]; with `--epsilon 255/255`",
    "patch:N": "a square of N pixels in the upper left corner",
    "border:N": "a frame of N pixels",
    "blank": "any picture, drawn from mid-grey instead of the clean one; with `--epsilon 255/255`",
}
"""Texts of ``threat_model=``, and what of a picture may change."""


_FAR = 16
"""How far outside an l-2 ball its placebo is drawn, in radii, before it is brought to the surface."""


@dataclass(frozen=True)
class Threat:
    """One value of ``threat_model=``, read."""

    name: str
    size: float = 0.0
    """The norm of ``l2``, the pixels of ``patch`` and ``border``."""

    @classmethod
    def parse(cls, text: str | None) -> Threat:
        """Read ``linf``, ``l2:8``, ``patch:24``, ``border:4`` or ``blank``.

        Raises:
            ValueError: If the text is none of these.
        """
        name, colon, size = (text or "").partition(":")
        sized = {form.partition(":")[0]: ":" in form for form in MEANINGS}
        try:
            number = (float(size) if name == "l2" else int(size)) if colon else 0
        except ValueError:
            number = 0
        if sized.get(name) is not bool(colon) or (colon and not 0 < number < float("inf")):
            forms = ", ".join(MEANINGS)
            raise ValueError(f"`threat_model` must be one of {forms}, R above 0, N a whole number; got `{text or ''}`.")
        return cls(name, float(number))

    @property
    def whole_range(self) -> bool:
        """Whether single values are not bounded, so that ``--epsilon`` has to be 255/255."""
        return self.name in ("l2", "blank")

    def holds(self, distance: float | None) -> bool:
        """Whether a file at this `distance` is allowed."""
        return distance == self.limit or (distance is not None and distance <= (self.limit or 0.0) + 1e-6)

    @property
    def limit(self) -> float | None:
        """Largest `distance` of a file; None where the largest change of a value says all."""
        return {"l2": self.size, "patch": 0.0, "border": 0.0}.get(self.name)

    def allowed(self, epsilon: int, size: tuple[int, int]) -> Any:
        """The set of pictures, as a threat model of `image_attacks`.

        Args:
            epsilon: Largest change of a value, in 255ths.
            size: Height and width of the picture.

        Raises:
            ValueError: If the set does not fit the picture.
        """
        from image_attacks import FileL2, Linf, Patch, Unconstrained

        ball = Linf(epsilon / 255)
        inside = Unconstrained() if epsilon == 255 else ball
        if self.name == "l2":
            return FileL2(self.size)
        if self.name == "patch":
            return Patch.rectangle(size, (0, 0), (int(self.size), int(self.size)), inside)
        if self.name == "border":
            return Patch.border(size, int(self.size), inside)
        return Unconstrained(0.5) if self.name == "blank" else ball

    def placebo(self, clean: Any, epsilon: int, generators: Any) -> Any:
        """Noise as large as an attack may be, moved into the set: random signs, in an l-2 ball a random direction.

        Signs are all of one size, so in a small ball none of them survives rounding; of normal numbers the largest do.

        Args:
            clean: Clean pixels ``(B, 3, H, W)``.
            epsilon: Largest change of a value, in 255ths.
            generators: One random stream per picture.
        """
        from image_attacks import sign_noise

        allowed = self.allowed(epsilon, (clean.shape[2], clean.shape[3]))
        if self.name == "l2":
            return allowed.project(clean + _FAR * (allowed.random_start(clean, generators) - clean), clean)
        return allowed.project(sign_noise(clean, epsilon / 255, generators), clean)

    def distance(self, file: Path, clean: Path) -> float | None:
        """How far a file is from the clean one in this threat's own measure; None where it has none.

        ``l2``: Euclidean norm in [0, 1] units. ``patch``, ``border``: largest change outside, in 255ths.

        Raises:
            ImageFileError: If a file cannot be read.
        """
        from image_attacks import load_png

        if self.limit is None:
            return None
        levels = 255 * (load_png(file).double() - load_png(clean).double())
        if self.name == "l2":
            return round(float(levels.round().norm()) / 255, 6)
        mask = self.allowed(255, (levels.shape[1], levels.shape[2])).mask
        return float((levels.abs() * ~mask).max().round())
