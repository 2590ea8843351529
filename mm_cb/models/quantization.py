"""4-bit weights for the language tower, and for nothing else; weights stored in few bits are refused."""

from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from mm_cb.core.errors import UserError
from mm_cb.models.cache import weight_files

_FLOATS = ("F32", "BF16", "F16", "F64")


def four_bit(dtype: torch.dtype, kept: Sequence[str]) -> BitsAndBytesConfig:
    """NF4 with double quantisation (the QLoRA paper's), computing in ``dtype``; modules in ``kept`` stay as they are.

    Raises:
        UserError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("`quantize: 4bit` needs the `quant` extra: pip install -e '.[quant]'.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped(kept),
    )


def refuse_stored_quantised(name_or_path: str | Path) -> int:
    """Refuse a checkpoint with weights that are no plain floats: read as such, without their scales, they are others.

    Returns:
        How many numbers the weights on this machine hold.

    Raises:
        UserError: With the number of such tensors and the first name; also if a file is no safetensors file.
    """
    found: dict[str, str] = {}
    numbers = 0
    for file in weight_files(name_or_path):
        try:
            with safe_open(file, "pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                found |= {key: one.get_dtype() for key, one in slices.items()}
                numbers += sum(prod(one.get_shape()) for one in slices.values())
        except (OSError, SafetensorError) as error:
            raise UserError(f"`{file}` must be a safetensors file, but it cannot be read: {error}") from error
    few = {key for key, kind in found.items() if kind not in _FLOATS and (kind[0] == "F" or key.endswith(".weight"))}
    wrong = sorted(few)
    if wrong:
        raise UserError(
            f"`{name_or_path}` must hold weights of {', '.join(_FLOATS)}, but {len(wrong)} are of another type, such "
            f"as `{wrong[0]}` ({found[wrong[0]]}): stored quantised weights are not read; take the full-precision "
            "model, with `quantize: 4bit` where memory is short."
        )
    return numbers


def skipped(kept: Sequence[str]) -> list[str]:
    """Modules to keep as transformers takes them, from the start of their paths: in the whole model and without head.

    ``"vision_tower"`` alone would not keep the whole model's tower out.
    """
    return [f"{prefix}{name}" for name in kept for prefix in ("model.", "")]


def assert_kept(model: nn.Module, kept: Sequence[str]) -> None:
    """Make sure that what must not be quantised is not, and that the decoder blocks are.

    Raises:
        RuntimeError: Naming modules of the tower, the projector or the head that were quantised, or saying that none
            was.
    """
    quantised = [name for name, module in model.named_modules() if _is_quantised(module)]
    wrong = [name for name in quantised if set(name.split(".")) & set(kept)]
    if wrong:
        raise RuntimeError(f"{', '.join(kept)} must stay unquantised, got 4-bit weights in {wrong[:5]}.")
    if not quantised:
        raise RuntimeError("The decoder blocks must be quantised, no module is.")


def _is_quantised(module: Any) -> bool:
    """Told by the weight's class, so that no import of bitsandbytes is needed to look."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")
