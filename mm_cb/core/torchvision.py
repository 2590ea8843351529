"""A torchvision whose compiled part does not fit the torch beside it, mended when it is first imported.

A package-index torchvision beside a CPU-only torch cannot load its compiled part; its import then fails, and with it
those of transformers and peft, because two operators were never declared. Declaring them is enough: nobody here calls
them, and everything else in torchvision that we use is plain Python. ``import mm_cb`` sees to it.
"""

import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

TorchvisionState = Literal["absent", "compiled", "declared"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[object] = []


@functools.cache
def declare_operators() -> TorchvisionState:
    """Declare the operators that the compiled part should have brought, where it does not load.

    Returns:
        ``"absent"``: torchvision is not installed (the PIL image backend still works); ``"compiled"``: its compiled
        part loads; ``"declared"``: it does not, and the operators were declared by us.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"
    import torch

    for library in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError, ImportError):
            continue
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return "compiled"
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        fragment.define(name + _SCHEMA)
    _declared.append(fragment)  # the declaration lives as long as this object
    return "declared"


class _BeforeItsImport:
    """Finds torchvision as Python does, and declares what it needs before its first line runs."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision" else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def declare_and_run(module: ModuleType) -> None:
            declare_operators()
            run(module)

        spec.loader.exec_module = declare_and_run  # type: ignore[method-assign]
        return spec


def mend_when_imported() -> None:
    """From now on the first ``import torchvision`` is mended; until then nothing heavy is imported."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeItsImport)
