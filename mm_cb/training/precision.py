"""How exactly a training computes: in float32 with gradients, whatever a caller has set torch to, and its products."""

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


@contextmanager
def usual_torch() -> Iterator[None]:
    """Torch as it is when nobody has set it: new tensors in float32, gradients on. Afterwards as it was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)
