"""Bytes as people read them."""

GIB = 2**30
_UNITS = ("GiB", "TiB", "PiB", "EiB")


def unit_of(size: float) -> tuple[float, str]:
    """The bytes of the unit that a size is told in, and its name: GiB, as cards are sold by, unless there are many."""
    power = next((n for n in range(len(_UNITS)) if size < 1024 ** (n + 1) * GIB), None)
    power = len(_UNITS) - 1 if power is None else power
    return float(1024**power * GIB), _UNITS[power]


def told_size(size: float) -> str:
    """``"13.9 GiB"``, ``"2.4 TiB"``; beyond all units ``"1.2e+09 EiB"``, and ``"< 0.1 GiB"``."""
    unit, name = unit_of(size)
    number = size / unit
    if number < 0.05:
        return f"< 0.1 {name}"
    return f"{number:.1f} {name}" if number < 1024 else f"{number:.2g} {name}"
