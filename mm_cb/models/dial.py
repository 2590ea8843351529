"""The dial between a base and its breaker: weights ``W0 + s (W1 - W0)``, of a LoRA or of two whole checkpoints.

At 1 the breaker is what was shipped and at 0 the base is what it was, to the last bit; a breaker whose adapter was
merged, or that was trained whole, needs its base beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mm_cb.core.errors import UserError

Scale = float | Tensor
"""From 0 (the base) to 1 (the breaker): one number, or one for every row of a batch, shape ``(B,)``."""


def read_scale(scale: Scale) -> Scale:
    """A scale that lies in its range; one number where all rows have the same.

    Raises:
        UserError: If it lies outside, or is no number.
    """
    values = scale.detach().float().cpu() if isinstance(scale, Tensor) else torch.tensor([float(scale)])
    if values.ndim != 1 or not bool(((values >= 0) & (values <= 1)).all()):
        raise UserError(
            f"the scale of an adapter must lie in 0 (the base) to 1 (as it was shipped), got {values.tolist()!s:.60}."
        )
    return float(values[0]) if bool((values == values[0]).all()) else values


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers that carry a LoRA."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def lora_turned(model: nn.Module, scale: Scale) -> Iterator[None]:
    """Run with every LoRA's change multiplied by ``scale``; restored at the end. 1 touches nothing.

    Raises:
        ValueError: If a LoRA has been merged into its layer, which no scale reaches.
    """
    layers = lora_layers(model) if isinstance(scale, Tensor) or scale != 1 else []
    if any(layer.merged for layer in layers):
        raise ValueError("`model` must hold its adapter beside its weights to scale it, but it is merged: unmerge it.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update({name: _scaled(value, scale) for name, value in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def _scaled(scaling: float, scale: Scale) -> Any:
    return _ByRow(scaling, scale) if isinstance(scale, Tensor) else scale * scaling


@dataclass(frozen=True)
class _ByRow:
    """A LoRA's scaling that differs by row: PEFT multiplies the change by it."""

    scaling: float
    scale: Tensor

    def __rmul__(self, change: Tensor) -> Tensor:
        rows = by_rows(change, len(self.scale))
        return (rows * self.scaling * _over(self.scale, rows)).flatten(0, 1)


def by_rows(values: Tensor, rows: int) -> Tensor:
    """``(B * n, ...)`` as ``(B, n, ...)``: what belongs to a row lies together, be it one sequence or many tiles."""
    if len(values) % rows:
        raise UserError(
            f"behaviours turn the adapter's scale each for itself, but a layer got {len(values)} rows for {rows} of "
            "them; use `--anneal steps`."
        )
    return values.unflatten(0, (rows, len(values) // rows))


def _over(scale: Tensor, rows: Tensor) -> Tensor:
    return scale.to(rows).view(-1, *[1] * (rows.ndim - 1))


class WeightDifference:
    """A breaker's weights and its base's, where they differ.

    Memory: the base's copy of what differs, and on the way a third copy, in between.

    Attributes:
        modules: Those of the breaker that hold such weights.
    """

    def __init__(self, breaker: nn.Module, base: nn.Module, name: str, base_name: str) -> None:
        """Compare two models of one shape.

        Args:
            breaker: The model under attack, whose weights are left as they are.
            base: What it was made from, in the same dtype; it may be dropped afterwards.
            name: The breaker's, for messages.
            base_name: The base's.

        Raises:
            UserError: If the base has other parameters or shapes, or holds the same weights.
        """
        own = dict(breaker.named_parameters(remove_duplicate=False))
        its = dict(base.named_parameters(remove_duplicate=False))
        _refuse_other_shapes(own, its, name, base_name)
        self._pairs: dict[nn.Module, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        for key, shipped in own.items():
            first = its[key].to(shipped.device)
            if not torch.equal(first, shipped):
                path, _, leaf = key.rpartition(".")
                held = self._pairs.setdefault(breaker.get_submodule(path), {})
                held[leaf] = nn.Parameter(first.detach(), requires_grad=False), shipped
        if not self._pairs:
            raise UserError(
                f"`--base {base_name}` holds the same weights as `{name}`, so that nothing sets a breaker apart from "
                "it; give the model that it was made from."
            )

    @property
    def modules(self) -> list[nn.Module]:
        """Those of the breaker that hold other weights than the base's."""
        return list(self._pairs)

    @contextmanager
    def turned(self, scale: Scale) -> Iterator[None]:
        """Run with the weights in between; restored at the end.

        Parameters are replaced, not overwritten: a graph that is still to be walked back keeps those it was made with.

        Raises:
            UserError: If every row has its own scale and weights differ outside of linear layers.
        """
        held = [(module, dict(module._parameters), module.__dict__.get("forward")) for module in self._pairs]
        try:
            made: dict[int, nn.Parameter] = {}
            for module, pairs in self._pairs.items():
                own = module.__dict__.get("forward")
                if isinstance(own, _RowForward):
                    del module.__dict__["forward"]
                if isinstance(scale, Tensor):
                    module._parameters.update({leaf: shipped for leaf, (_, shipped) in pairs.items()})
                    module.__dict__["forward"] = _RowForward(module, pairs, scale)
                    continue
                for leaf, pair in pairs.items():  # tied weights are one parameter in two places
                    if id(pair[1]) not in made:
                        made[id(pair[1])] = _between(pair, scale)
                    module._parameters[leaf] = made[id(pair[1])]
            yield
        finally:
            for module, parameters, forward in held:
                module._parameters.update(parameters)
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward


def _refuse_other_shapes(own: dict[str, Any], its: dict[str, Any], name: str, base_name: str) -> None:
    def told(parameters: dict[str, Any], key: str) -> str:
        return str(list(parameters[key].shape)) if key in parameters else "nothing"

    for key in sorted({**own, **its}):
        if told(own, key) != told(its, key):
            raise UserError(
                f"`--base {base_name}` must be the model that `{name}` was made from, but at `{key}` it has "
                f"{told(its, key)}, where that has {told(own, key)}; give that model."
            )


def _between(pair: tuple[nn.Parameter, nn.Parameter], scale: float) -> nn.Parameter:
    """The weights at a scale; at the ends those of base and breaker themselves."""
    first, shipped = pair
    if scale in (0, 1):
        return shipped if scale == 1 else first
    return nn.Parameter(torch.lerp(first, shipped, scale), requires_grad=False)


class _RowForward:
    """What a linear layer computes where every row has weights of its own, in between two."""

    def __init__(self, module: nn.Module, pairs: dict[str, tuple[nn.Parameter, nn.Parameter]], scale: Tensor) -> None:
        if not isinstance(module, nn.Linear):
            raise UserError(
                "`--anneal loss` scales every behaviour's weights for itself, in linear layers alone, but the breaker "
                f"differs from its base in a {type(module).__name__} too; use `--anneal steps`."
            )
        same = {leaf: (one, one) for leaf, one in module._parameters.items() if one is not None}
        self.pairs, self.scale = same | pairs, scale

    def __call__(self, x: Tensor) -> Tensor:
        rows = by_rows(x, len(self.scale))
        out: Tensor = _LinearBetween.apply(rows, *self.pairs["weight"], self.scale.tolist())
        if "bias" in self.pairs:
            biases = torch.stack([torch.lerp(*self.pairs["bias"], scale) for scale in self.scale.tolist()])
            out = out + biases.view(len(biases), *[1] * (out.ndim - 2), -1)
        return out.flatten(0, 1)


class _LinearBetween(torch.autograd.Function):
    """``x_b (W0 + s_b (W1 - W0))^T``, no copy of the weights kept for the way back; as many products as one layer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, first: Tensor, shipped: Tensor, scales: list[float]) -> Tensor:
        ctx.save_for_backward(first, shipped)
        ctx.scales = scales
        return torch.stack([F.linear(x, torch.lerp(first, shipped, s)) for x, s in zip(rows, scales, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (first, shipped) = gradients, ctx.saved_tensors
        back = [g @ torch.lerp(first, shipped, s) for g, s in zip(gradient, ctx.scales, strict=True)]
        return torch.stack(back), None, None, None
