"""How exact float32 products of a training are: those of the adapter, which stays in float32 beside a half model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def adapter_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """TF32 (ten bits) on a GPU whose model has bfloat16's seven or float16's ten; elsewhere as it was. Restored.

    Args:
        device: The model's.
        dtype: Of its own weights.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
