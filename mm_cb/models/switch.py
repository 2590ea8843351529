"""The switch of an adapter: off for a while, as with PEFT's own, which takes a census of all modules each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class _Parts(NamedTuple):
    adapters: tuple[str, ...]
    """The adapters that the model carried when the modules were searched."""
    switches: list[Any]
    """The modules that look at the switch."""
    dropouts: list[nn.Module]
    """The adapters' own."""


_FOUND: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run as if the model had no adapter; restored at the end, and which parameters are trainable is left alone."""
    layers = _parts(model).switches
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def only_dropout_of_adapter(model: nn.Module, on: bool) -> None:
    """Leave the model in evaluation mode, but for the dropout of its adapters, which is active if ``on``."""
    if model.training:
        model.eval()
    for module in _parts(model).dropouts:
        module.training = on


def _parts(model: nn.Module) -> _Parts:
    """Searched once for each set of adapters that a model carries."""
    names = tuple(getattr(model, "peft_config", ()))
    if model not in _FOUND or _FOUND[model].adapters != names:
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        switches = [module for module in model.modules() if isinstance(module, kinds)]
        named = model.named_modules()
        dropouts = [module for name, module in named if "lora_dropout" in name.split(".")]
        _FOUND[model] = _Parts(names, switches, dropouts)
    return _FOUND[model]
