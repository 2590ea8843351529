"""Load a model and its adapter, from safetensors only."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.utils import logging

from mm_cb.errors import UserError
from mm_cb.models.llava_next import LlavaNextModel

MINIATURE = Path(__file__).resolve().parent.parent / "miniature" / "weights"
"""The folder of the embedded default model, which ``"miniature"`` stands for."""


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    image_backend: str = "pil",
    trainable: bool = False,
) -> LlavaNextModel:
    """Load a LLaVA-NeXT and perhaps an adapter, from safetensors only.

    Args:
        name_or_path: ``"miniature"``, a local folder, or a hub id.
        adapter: Folder of a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``).
        device: Torch device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        image_backend: ``"pil"`` or ``"torchvision"``: which image processor resizes the pictures.
        trainable: Whether the adapter's parameters require gradients; those of the base never do.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: If the model or the adapter is not there.
    """
    with quiet_libraries():
        model = _load_base(name_or_path, dtype)
        model.requires_grad_(False)
        loaded: nn.Module = model.to(device)
        if adapter is not None:
            loaded = _load_adapter(loaded, Path(adapter), device, trainable)
        processor = _load_processor(name_or_path, image_backend)
    return LlavaNextModel(loaded.eval(), processor, str(name_or_path))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without transformers' progress bars, the hub's notes on retries, and a note on a property that PEFT still reads.

    What failed in the end is raised, and said once.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    hub = getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        hub.setLevel(level)
        if shown:
            logging.enable_progress_bar()


def _source(name_or_path: str | Path) -> str:
    """The folder or hub id behind a name."""
    return str(MINIATURE if str(name_or_path) == "miniature" else name_or_path)


def _load_base(name_or_path: str | Path, dtype: str) -> Any:
    """The transformers model, on the CPU."""
    try:
        return LlavaNextForConditionalGeneration.from_pretrained(
            _source(name_or_path), dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot load a LLaVA-NeXT from `{name_or_path}` (expected `miniature`, a folder with safetensors or a hub "
            f"id): {error}"
        ) from error


def _load_processor(name_or_path: str | Path, image_backend: str) -> LlavaNextProcessor:
    """The processor, with exactly the image backend asked for (transformers would fall back to another one)."""
    processor = LlavaNextProcessor.from_pretrained(
        _source(name_or_path), trust_remote_code=False, backend=image_backend
    )
    came = "pil" if type(processor.image_processor).__name__.endswith("Pil") else "torchvision"
    if came != image_backend:
        raise UserError(f"image backend `{image_backend}` is not available here, only `{came}`.")
    return processor


def _load_adapter(model: nn.Module, folder: Path, device: str, trainable: bool) -> PeftModel:
    """Put a PEFT adapter on a model."""
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"`{folder}` is not an adapter: expected a folder with adapter_config.json and adapter_model.safetensors."
        )
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, torch_device=device)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"the adapter in `{folder}` does not fit this model: {error}") from error
