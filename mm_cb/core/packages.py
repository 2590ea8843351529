"""One place for the quirks of the packages that we build on."""

import functools
import http.client
import importlib.util
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

TorchvisionState = Literal["absent", "compiled", "declared"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_PATIENCE = 10.0
"""Seconds that the hub may take for a first answer."""
_PROXYS_OWN = (407, 502, 503, 504)
_declared: list[object] = []


@functools.cache
def prepare_torchvision() -> TorchvisionState:
    """Make ``import torchvision``, and with it ``import transformers``, work beside any torch build.

    A package-index torchvision beside a CPU-only torch cannot load its compiled part; its import then fails because two
    operators were never declared. Declaring them is enough: nobody here calls them, and everything else in torchvision
    that we use is plain Python. Call this before the first import of transformers.

    Returns:
        ``"absent"``: torchvision is not installed (the PIL image backend still works); ``"compiled"``: its compiled
        part loads; ``"declared"``: it does not, and the operators were declared by us.
    """
    if "torchvision" in sys.modules:
        return "compiled" if not _declared else "declared"
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


@functools.cache
def stay_offline_without_network() -> None:
    """Keep the hub's libraries offline where nobody answers at the hub's address: cached files at once, or one error.

    Otherwise every file that is asked for costs half a minute of retries, and a dry run minutes: without network, and
    behind a proxy that does not let the hub through.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    constants.HF_HUB_OFFLINE = True  # read by huggingface_hub and transformers at every request, by datasets once
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _answers(address: str) -> bool:
    """Whether anybody but a proxy answers at an address; one whose certificate only others can check counts."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError as error:
        return error.code not in _PROXYS_OWN
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
