"""The flags of what an attack may change: a norm, how far, and the size of a patch or border."""

from typing import Annotated

from mm_cb.attacks.threats import NORMS, Threat
from mm_cb.cli.options import number, option
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS, OutOfRange

PANEL = "What may change"
"""Their heading in --help."""
_EPSILON_GRID = 255

Norm = Annotated[str, option("NORM", f"{', '.join(NORMS)}: what of a picture may change.", PANEL)]
Epsilon = Annotated[
    str | None,
    option(
        "E",
        "How far: N/255 per value for linf, patch and border; a Euclidean radius, pixels in [0, 1], for l2.  "
        "[default: 32/255 for linf, 255/255 for patch and border]",
        PANEL,
    ),
]
PatchSize = Annotated[int | None, number("patch_size", "Side of the patch in pixels.", PANEL)]
BorderWidth = Annotated[int | None, number("border_width", "Width of the border in pixels.", PANEL)]


def parse_threat(norm: str, epsilon: str | None, patch_size: int | None, border_width: int | None) -> Threat:
    """What the four options together stand for.

    Raises:
        UserError: If one is missing, does not go with the norm, or is out of range.
    """
    if norm not in NORMS:
        raise UserError(f"`--norm` must be one of {', '.join(NORMS)}, got `{norm}`.")
    sizes = {"patch": ("--patch-size", patch_size), "border": ("--border-width", border_width)}
    for owner, (flag, value) in sizes.items():
        if (value is not None) is not (owner == norm):
            says = "needs" if owner == norm else "does not read"
            raise UserError(f"`--norm {norm}` {says} `{flag}`.")
    if norm == "blank":
        if epsilon not in (None, "255/255"):
            raise UserError("`--norm blank` bounds nothing: leave out `--epsilon`.")
        return Threat(norm, 255)
    if norm == "l2":
        return Threat(norm, 255, _radius(epsilon))
    levels = parse_levels(epsilon or ("32/255" if norm == "linf" else "255/255"))
    return Threat(norm, levels, float(sizes[norm][1] or 0) if norm in sizes else 0.0)


def _radius(epsilon: str | None) -> float:
    try:
        return float(LIMITS["epsilon"].read("--epsilon", epsilon))
    except OutOfRange as error:
        raise UserError(
            "`--norm l2` needs `--epsilon R`, a Euclidean radius over all values in [0, 1], such as 8: a "
            f"{LIMITS['epsilon'].text} ({LIMITS['epsilon'].why}), got `{epsilon}`."
        ) from error


def parse_levels(text: str) -> int:
    """The numerator of an image budget over 255: ``"32/255"`` -> 32; decimals only where they lie on that grid.

    Raises:
        UserError: If the text is no number, lies outside 0..1 or between two grid points.
    """
    number, slash, denominator = text.partition("/")
    try:
        plain = number.isascii() and "_" not in number  # Python reads `1_0` and digits of any script
        value = float(number if plain else "") * (1 if slash else _EPSILON_GRID)
        on_grid = abs(value - round(value)) < 1e-3 and 0 <= round(value) <= _EPSILON_GRID
    except (ValueError, OverflowError):
        value, on_grid = 0.0, False
    if not on_grid or (slash and denominator.strip() != "255"):
        raise UserError(
            f"`--epsilon` must be n/255 with n in 0..255 (saved images have 8 bits), such as 32/255; got `{text}`."
        )
    return round(value)
