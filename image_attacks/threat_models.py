"""What an attacker may change: the sets of images around a clean one, with the projection onto them."""

from dataclasses import dataclass

from torch import Tensor, maximum, minimum

from .noise import Generators, uniform_like


@dataclass(frozen=True)
class Linf:
    """Every value may move by at most ``epsilon`` and stays a valid pixel in [0, 1]."""

    epsilon: float
    """Radius in [0, 1] units. On the 1/255 grid (``8 / 255``) rounding to an 8-bit file cannot leave the ball."""

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"`epsilon` must lie in [0, 1], got {self.epsilon!r}. Pixels are in [0, 1]: write 8 / 255, not 8."
            )

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """Return the nearest allowed point: in the ball around ``clean`` and in [0, 1]; exact, as both are boxes."""
        return minimum(maximum(pixels, (clean - self.epsilon).clamp(min=0)), (clean + self.epsilon).clamp(max=1))

    def random_start(self, clean: Tensor, generator: Generators) -> Tensor:
        """Draw uniformly from the ball, then clamp to [0, 1]."""
        return self.project(clean + self.epsilon * (2 * uniform_like(clean, generator) - 1), clean)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """Return the unit step along which a linear function falls fastest: minus the sign of its gradient.

        The only place of this package that decides between up and down.
        """
        return -gradient.sign()
