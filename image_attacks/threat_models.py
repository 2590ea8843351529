"""What an attacker may change: sets of images around a clean one, with the projection onto them."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, maximum, minimum

from .arguments import number, whole
from .noise import Generators, uniform_like

_PIXELS = "whole numbers of pixels"
LEVEL = 1 / 255
"""One 8-bit level, the smallest move that survives in a file."""


class ThreatModel(Protocol):
    """What every attack of this package asks of a threat model; all images are ``(B, C, H, W)`` in [0, 1]."""

    @property
    def step_range(self) -> tuple[float, float]:
        """First and last step size that suit the set, in the unit of :meth:`descent_direction`."""

    def start(self, clean: Tensor) -> Tensor:
        """Return where the first run begins: the image itself, or a blank one."""

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Return the nearest allowed point."""

    def random_start(self, clean: Tensor, generator: Generators) -> Tensor:
        """Draw an allowed point."""

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """Return the step of size 1 along which a linear function falls fastest."""


def check_threat_model(name: str, value: object) -> None:
    """Refuse what is no threat model, such as a bare radius, or a class that nobody has called; TypeError says."""
    methods = ("step_range", "start", "project", "random_start", "descent_direction")
    if isinstance(value, type) or not all(hasattr(value, method) for method in methods):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.60} ({type(value).__name__})"
        raise TypeError(f"`{name}` must be a threat model such as Linf(8 / 255), got {got}.")


@dataclass(frozen=True)
class Linf:
    """Every value may move by at most ``epsilon`` and stays a valid pixel in [0, 1]."""

    epsilon: float
    """Radius in [0, 1] units. On the 1/255 grid (``8 / 255``) rounding to an 8-bit file cannot leave the ball."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", number("epsilon", self.epsilon))
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"`epsilon` must lie in [0, 1], got {self.epsilon!r}. Pixels are in [0, 1]: write 8 / 255, not 8."
            )

    @property
    def levels(self) -> int:
        """The radius in whole 8-bit levels, as an image file needs it.

        Raises:
            ValueError: If the radius is not on the 1/255 grid: rounding to 8 bits could leave the ball.
        """
        levels = round(self.epsilon * 255)
        if abs(self.epsilon * 255 - levels) > 1e-4:
            below = math.floor(self.epsilon * 255)
            raise ValueError(
                f"`epsilon` must be a whole number of 1/255 for an image file, got {self.epsilon * 255:.2f} / 255. "
                f"Take {below} / 255 or {below + 1} / 255, or save with `round_towards(pixels, clean)`."
            )
        return levels

    @property
    def step_range(self) -> tuple[float, float]:
        """From the diameter of the ball to one level."""
        return 2 * self.epsilon, LEVEL

    def start(self, clean: Tensor) -> Tensor:
        """Begin at the image."""
        return clean

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Return the nearest allowed point: in the ball around ``clean`` and in [0, 1]; exact, as both are boxes."""
        return minimum(maximum(pixels, (clean - self.epsilon).clamp(min=0)), (clean + self.epsilon).clamp(max=1))

    def random_start(self, clean: Tensor, generator: Generators) -> Tensor:
        """Draw uniformly from the ball, then clamp to [0, 1]."""
        return self.project(clean + self.epsilon * (2 * uniform_like(clean, generator) - 1), clean)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """Return minus the sign of the gradient."""
        return -gradient.sign()


@dataclass(frozen=True)
class L2:
    """The change of an image has Euclidean norm at most ``epsilon``, and every value stays a valid pixel in [0, 1].

    Rounding to an 8-bit file may leave this ball; :func:`~image_attacks.round_towards` does not.
    """

    epsilon: float
    """Radius in [0, 1] units over all values of an image; 1 is one pixel's channel from black to white."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", number("epsilon", self.epsilon))
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"`epsilon` must be at least 0 and finite, got {self.epsilon!r}.")

    @property
    def step_range(self) -> tuple[float, float]:
        """From the diameter of the ball to a sixteenth of its radius."""
        return 2 * self.epsilon, self.epsilon / 16

    def start(self, clean: Tensor) -> Tensor:
        """Begin at the image."""
        return clean

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Return the nearest point of the ball and of the box [0, 1] together (not of one after the other).

        That point is ``clamp(clean + s * (pixels - clean))`` for the largest scale ``s <= 1`` that fits the ball. In
        ``s^2`` its squared norm is concave and piecewise linear, so that Newton's method from below ends after finitely
        many steps and never leaves the ball on the way.
        """
        move = pixels - clean
        room = torch.where(move < 0, clean, 1 - clean)
        squares, limits = move.square().flatten(1), room.square().flatten(1)
        scale = (self.epsilon**2 / squares.sum(1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        for _ in range(20):
            free = squares * scale <= limits
            left = self.epsilon**2 - (limits * ~free).sum(1, keepdim=True)
            further = (left / (squares * free).sum(1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
            if bool((further <= scale * (1 + 1e-6)).all()):
                break
            scale = maximum(scale, further)
        projected = (clean + scale.sqrt().view(-1, 1, 1, 1) * move).clamp(0, 1)
        return torch.where(_inside(move, room, self.epsilon), pixels, projected)

    def random_start(self, clean: Tensor, generator: Generators) -> Tensor:
        """Draw uniformly from the ball, then project.

        In many dimensions nearly all of the ball lies at its surface. A radius drawn uniformly instead would put
        restarts half as far out on average, close to the image that the first run has started from.
        """
        direction = _unit(_gaussian_like(clean, generator))
        radius = self.epsilon * uniform_like(clean[:, :1, :1, :1], generator) ** (1 / clean[0].numel())
        return self.project(clean + radius * direction, clean)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """Return minus the gradient, scaled to norm 1 per image; a zero gradient stays zero."""
        return -_unit(gradient)


@dataclass(frozen=True)
class FileL2(L2):
    """The 8-bit file that an image becomes, rounded to the nearest level, is at most ``epsilon`` from the clean one.

    Rounding moves a point of the l-2 ball by up to half a level in every value, which is more than a small radius
    bears. For objectives that round what they are given, as an :class:`~image_attacks.ExactPreprocessing` does:
    then what they evaluate is the file, and it is in the ball. The pixels themselves need not be.
    """

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Go towards the clean image, which is 8-bit, until the rounded one is in the ball, and no further.

        A line search, not the nearest point. On the way, ``clamp(clean + s * (pixels - clean))`` with s from 1 to 0, no
        rounded value moves away from the clean one, so that bisection finds the place.
        """
        move = pixels - clean
        limit, before = (255 * self.epsilon) ** 2 * (1 + 1e-9), (255 * clean).round()

        def fits(scale: Tensor) -> Tensor:
            levels = (255 * (clean + scale * move).clamp(0, 1)).round() - before
            return levels.double().square().sum((1, 2, 3), keepdim=True) <= limit

        low = torch.zeros(len(pixels), 1, 1, 1, dtype=pixels.dtype, device=pixels.device)
        high = torch.ones_like(low)
        low = torch.where(fits(high), high, low)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            inside = fits(middle)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return torch.where(low == 1, pixels, clean + low * move).clamp(0, 1)


_BISECTIONS = 24
"""As many as a float32 has digits."""


@dataclass(frozen=True)
class Unconstrained:
    """Any image. ``blank`` begins at a flat colour instead of the clean image: a hijack drawn from nothing."""

    blank: float | None = None
    """Grey value in [0, 1] of the first run's start; None begins at the image."""

    def __post_init__(self) -> None:
        if self.blank is None:
            return
        object.__setattr__(self, "blank", number("blank", self.blank))
        if not 0 <= self.blank <= 1:
            raise ValueError(f"`blank` must lie in [0, 1], got {self.blank!r}; mid-grey is 0.5.")

    @property
    def step_range(self) -> tuple[float, float]:
        """From half the pixel range, which takes mid-grey to either end, to one level."""
        return 0.5, LEVEL

    def start(self, clean: Tensor) -> Tensor:
        """Begin at the image or at the flat colour."""
        return clean if self.blank is None else torch.full_like(clean, self.blank)

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Clamp to [0, 1]."""
        return pixels.clamp(0, 1)

    def random_start(self, clean: Tensor, generator: Generators) -> Tensor:
        """Draw every value uniformly from [0, 1]."""
        return uniform_like(clean, generator)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """Return minus the sign of the gradient."""
        return -gradient.sign()


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """Only the pixels under ``mask`` may change, as far as ``within`` lets them.

    >>> Patch.border((6, 8), width=2).mask.int()[0].tolist()
    [1, 1, 1, 1, 1, 1, 1, 1]
    """

    mask: Tensor
    """True where the attacker may paint, shape ``(H, W)``."""
    within: ThreatModel = field(default_factory=Unconstrained)

    def __post_init__(self) -> None:
        check_threat_model("within", self.within)
        if not isinstance(self.mask, Tensor):
            raise TypeError(f"`mask` must be a boolean tensor of shape (H, W), got {type(self.mask).__name__}.")
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise ValueError(
                "`mask` must be boolean of shape (H, W) with at least one True, got "
                f"{self.mask.dtype} of shape {tuple(self.mask.shape)} with {int(self.mask.sum())} set."
            )

    def __repr__(self) -> str:
        # A saved state knows its attack by what its settings print, and torch leaves out the middle of a large mask.
        digest = hashlib.sha256(self.mask.cpu().numpy().tobytes()).hexdigest()[:16]
        return f"Patch({int(self.mask.sum())} of {tuple(self.mask.shape)}, mask {digest}, within={self.within!r})"

    @classmethod
    def rectangle(
        cls,
        image_size: tuple[int, int],
        corner: tuple[int, int],
        size: tuple[int, int],
        within: ThreatModel | None = None,
    ) -> "Patch":
        """Build a patch of ``size`` (height, width) whose upper left pixel is at ``corner`` (row, column).

        Raises:
            ValueError: If it does not lie inside the image, or is not given in whole pixels.
        """
        image_size, corner, size = _pair("image_size", image_size), _pair("corner", corner), _pair("size", size)
        (top, left), (height, width) = corner, size
        if min(top, left) < 0 or min(size) < 1 or top + height > image_size[0] or left + width > image_size[1]:
            raise ValueError(f"The patch {size} at {corner} must lie inside an image of {image_size} (height, width).")
        mask = torch.zeros(image_size, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        return cls(mask, within or Unconstrained())

    @classmethod
    def border(cls, image_size: tuple[int, int], width: int, within: ThreatModel | None = None) -> "Patch":
        """Build a frame of ``width`` pixels around the image.

        Raises:
            ValueError: If the width is not a whole number between 1 and half the shorter side.
        """
        image_size, width = _pair("image_size", image_size), whole("width", width, _PIXELS)
        if not 1 <= width <= min(image_size) / 2:
            raise ValueError(
                f"`width` must lie in 1..{min(image_size) // 2} for an image of {image_size}, got {width}."
            )
        mask = torch.ones(image_size, dtype=torch.bool)
        mask[width : image_size[0] - width, width : image_size[1] - width] = False
        return cls(mask, within or Unconstrained())

    @property
    def step_range(self) -> tuple[float, float]:
        """Those of the threat model under the mask."""
        return self.within.step_range

    def start(self, clean: Tensor) -> Tensor:
        """Begin as ``within`` does, under the mask."""
        return self._under_mask(self.within.start(clean), clean)

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Put the clean pixels back outside the mask and project what is under it."""
        return self.within.project(self._under_mask(pixels, clean), clean)

    def random_start(self, clean: Tensor, generator: Generators) -> Tensor:
        """Draw from ``within``, under the mask."""
        return self._under_mask(self.within.random_start(clean, generator), clean)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of ``within`` for the gradient under the mask."""
        return self.within.descent_direction(self._under_mask(gradient, torch.zeros_like(gradient)))

    def _under_mask(self, inside: Tensor, outside: Tensor) -> Tensor:
        if self.mask.shape != inside.shape[-2:]:
            raise ValueError(
                f"`mask` must have the images' height and width {tuple(inside.shape[-2:])}, got "
                f"{tuple(self.mask.shape)}."
            )
        return torch.where(self.mask.to(inside.device), inside, outside)


def _pair(name: str, values: tuple[int, int]) -> tuple[int, int]:
    first, second = values
    return whole(name, first, _PIXELS), whole(name, second, _PIXELS)


def _inside(move: Tensor, room: Tensor, epsilon: float) -> Tensor:
    """Tell which points need no projection, per image: shape ``(B, 1, 1, 1)``."""
    fits = (move.abs() <= room).flatten(1).all(1) & (move.flatten(1).norm(dim=1) <= epsilon)
    return fits.view(-1, 1, 1, 1)


def _unit(values: Tensor) -> Tensor:
    """Scale every image's values to norm 1; by their largest first, since the squares of small ones underflow."""
    largest = values.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = values / largest.where(largest > 0, 1.0)
    norm = scaled.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return scaled / norm.where(norm > 0, 1.0)


def _gaussian_like(images: Tensor, generator: Generators) -> Tensor:
    """Draw normal numbers by Box and Muller's transform, so that every draw stays a uniform one."""
    first, second = uniform_like(images, generator), uniform_like(images, generator)
    return (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()
