"""mm_cb: train multimodal circuit breakers, attack them with images, measure what they keep, report it on one page.

Importing this package is cheap on purpose: nothing here imports torch or transformers before one of its names is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import mm_cb.benchmarks
import mm_cb.miniature  # noqa: F401  (the one place that knows the guest, whose import registers it)
from mm_cb.core.torchvision import mend_when_imported

if TYPE_CHECKING:
    from mm_cb.attacks.config import AttackConfig
    from mm_cb.attacks.run import attack
    from mm_cb.attacks.threats import Threat
    from mm_cb.benchmarks.runner import evaluate
    from mm_cb.report import write_report
    from mm_cb.training.rr_config import RRConfig
    from mm_cb.training.rr_trainer import RRTrainer

mend_when_imported()

__version__ = "0.1.0"
__all__ = ["AttackConfig", "RRConfig", "RRTrainer", "Threat", "attack", "evaluate", "write_report"]

_WHERE = {
    "AttackConfig": "mm_cb.attacks.config",
    "RRConfig": "mm_cb.training.rr_config",
    "RRTrainer": "mm_cb.training.rr_trainer",
    "Threat": "mm_cb.attacks.threats",
    "attack": "mm_cb.attacks.run",
    "evaluate": "mm_cb.benchmarks.runner",
    "write_report": "mm_cb.report",
}
"""What Python users call: name → module, imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
