"""What a name stands for: its configuration, its family, its shapes, its processor."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mm_cb.core.embedded import guest_names
from mm_cb.core.errors import UserError, one_line
from mm_cb.models.base import ChatModel
from mm_cb.models.cache import model_folder
from mm_cb.models.registry import family_of


def read_config(name_or_path: str | Path) -> Any:
    """The transformers configuration of a model.

    Raises:
        UserError: If there is none, or it is behind a gate that this machine has no key to.
    """
    folder = model_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_loaded(name_or_path, error) from error


def skeleton(config: Any, name: str = "", processor: Any = None) -> ChatModel:
    """The whole model as shapes alone, on the meta device: no weight is read and no memory used.

    Raises:
        UserError: If no family here has models of this type.
    """
    family = family_of(config, name)
    with torch.device("meta"):
        return family(family.loads.from_config(config), processor, name)


def load_processor(name_or_path: str | Path, config: Any, image_backend: str = "pil") -> Any:
    """The processor, with exactly the image backend asked for (transformers would fall back to another one).

    Raises:
        UserError: If it is not there, its tokenizer is broken, or the backend is not available.
    """
    folder, family = str(model_folder(name_or_path)), family_of(config, str(name_or_path))
    try:
        processor = family.read_processor(folder, image_backend)
    except (OSError, ValueError, ImportError) as error:
        raise not_loaded(name_or_path, error) from error
    images = getattr(processor, "image_processor", None)
    came = "pil" if type(images).__name__.endswith("Pil") else "torchvision"
    if images is not None and came != image_backend:
        raise UserError(f"image backend `{image_backend}` is not available here, only `{came}`.")
    _check_tokenizer(processor.tokenizer, config.get_text_config(), folder)
    return processor


def _check_tokenizer(tokenizer: Any, config: Any, folder: str) -> None:
    """Refuse a tokenizer that has so few tokens that its file cannot have been read."""
    if 2 * len(tokenizer) < config.vocab_size:
        raise UserError(
            f"the tokenizer of `{folder}` has {len(tokenizer)} tokens, its model {config.vocab_size}; its files are "
            "incomplete: get tokenizer.json."
        )


def not_loaded(name_or_path: str | Path, error: Exception) -> UserError:
    """The user's error for a model whose files are here but cannot be read."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"`{name_or_path}` is read by code of its own, which is never run here (trust_remote_code is off); use a "
            "model of transformers' own code."
        )
    return UserError(
        f"cannot load a model from `{name_or_path}` (expected {guest_names()}, or a model of transformers' own code "
        f"with safetensors, in a folder or on the hub): {one_line(str(error))}"
    )
