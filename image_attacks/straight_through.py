"""The straight-through gradient: exact values forward, the gradient of something smooth backward."""

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """Show ``exact`` to the model and hand its gradient to ``smooth``."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        """Pass ``exact`` on, of the shape of ``smooth``."""
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient to ``smooth`` alone."""
        return gradients[0], None
