"""What a name stands for: its configuration, its processor, its family."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaNextForConditionalGeneration
from transformers import LlavaNextProcessor as Processor

from mm_cb.core.embedded import guest_names
from mm_cb.core.errors import UserError, one_line
from mm_cb.models.base import ChatModel
from mm_cb.models.cache import model_folder
from mm_cb.models.llava_next import LlavaNextModel
from mm_cb.models.text import TextModel, TextProcessor

_WRONG_END = "<\\s>"
"""How older copies of LLaVA-NeXT's chat template end an answer: not the end-of-sequence token, but four characters."""

logger = logging.getLogger(__name__)


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


def is_llava_next(config: Any) -> bool:
    """Whether a configuration is a LLaVA-NeXT's; everything else is taken for a causal language model."""
    return config.model_type == "llava_next"


def model_class(config: Any) -> Any:
    """The transformers class with the head: what a finished adapter belongs to."""
    return LlavaNextForConditionalGeneration if is_llava_next(config) else AutoModelForCausalLM


def skeleton(config: Any, name: str = "", processor: Any = None) -> ChatModel:
    """The whole model as shapes alone, on the meta device: no weight is read and no memory used.

    Raises:
        UserError: If transformers has no causal language model of this type.
    """
    try:
        with torch.device("meta"):
            if is_llava_next(config):
                return LlavaNextModel(LlavaNextForConditionalGeneration(config), processor, name)
            return TextModel(AutoModelForCausalLM.from_config(config), processor, name)
    except ValueError as error:
        raise UserError(
            f"`{name}` must be a LLaVA-NeXT or a causal language model, got {config.model_type}."
        ) from error


def load_processor(name_or_path: str | Path, config: Any, image_backend: str = "pil") -> Any:
    """The processor, with exactly the image backend asked for (transformers would fall back to another one).

    Raises:
        UserError: If it is not there, its tokenizer is broken, or the backend is not available.
    """
    folder = str(model_folder(name_or_path))
    try:
        if not is_llava_next(config):
            return TextProcessor(_sound(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), config, folder))
        processor = Processor.from_pretrained(folder, trust_remote_code=False, backend=image_backend)
    except (OSError, ValueError) as error:
        raise not_loaded(name_or_path, error) from error
    came = "pil" if type(processor.image_processor).__name__.endswith("Pil") else "torchvision"
    if came != image_backend:
        raise UserError(f"image backend `{image_backend}` is not available here, only `{came}`.")
    _sound(processor.tokenizer, config.text_config, folder)
    if isinstance(processor.chat_template, str) and _WRONG_END in processor.chat_template:
        logger.info("the chat template of `%s` ends answers with %s; read as the end token.", folder, _WRONG_END)
        processor.chat_template = processor.chat_template.replace(_WRONG_END, processor.tokenizer.eos_token)
    return processor


def _sound(tokenizer: Any, config: Any, folder: str) -> Any:
    """The tokenizer itself, unless it has so few tokens that its file cannot have been read."""
    if 2 * len(tokenizer) < config.vocab_size:
        raise UserError(
            f"the tokenizer of `{folder}` has {len(tokenizer)} tokens, its model {config.vocab_size}; its files are "
            "incomplete: get tokenizer.json."
        )
    return tokenizer


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
