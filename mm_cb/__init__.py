"""mm_cb: train multimodal circuit breakers, attack them with images, measure what they keep, report it on one page.

Importing this package is cheap on purpose: nothing here imports torch or transformers.
"""

from typing import Any

import mm_cb.benchmarks
import mm_cb.miniature  # noqa: F401  (the one place that knows the guest, whose import registers it)

__version__ = "0.1.0"

_WHERE = {"evaluate": "mm_cb.benchmarks.runner"}
"""What Python users call: name → module, imported when it is asked for."""


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'mm_cb' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
