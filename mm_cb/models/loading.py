"""Load a model and its adapter, from safetensors only."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.utils import logging

from mm_cb.core.devices import refuse_absent
from mm_cb.core.errors import UserError
from mm_cb.models.adapters import put_adapter, refuse_not_finite
from mm_cb.models.base import ChatModel
from mm_cb.models.cache import model_folder
from mm_cb.models.decoding import generation_config
from mm_cb.models.dial import WeightDifference
from mm_cb.models.families import load_processor, not_loaded, read_config, skeleton
from mm_cb.models.fingerprint import place
from mm_cb.models.inputs import Arguments
from mm_cb.models.laws import check_sizes
from mm_cb.models.quantization import assert_kept, four_bit, refuse_stored_quantised
from mm_cb.models.registry import family_of
from mm_cb.models.templates import check_template

__all__ = ["load_model", "load_plain", "load_tower", "load_whole", "quiet_libraries", "refuse_attention"]

_MOVED_WITH_THE_TOWER = ("hf_device_map", "hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method")


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    image_backend: str = "pil",
    attention: str = "sdpa",
    quantize: str | None = None,
    trainable: bool = False,
) -> Any:
    """Load a whole model of any family and perhaps an adapter, from safetensors only.

    Args:
        name_or_path: An embedded model's name, a local folder, or a hub id (``ORG/NAME``, ``ORG/NAME@REVISION``); keys
            may have any layout that transformers wrote.
        adapter: Folder of a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``).
        base: What a breaker without adapter was made from, to switch and scale what sets it apart.
        device: Torch device, or ``"auto"`` to spread the model over all devices.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        image_backend: ``"pil"`` or ``"torchvision"``: which image processor resizes the pictures.
        attention: ``"eager"``, ``"sdpa"`` or ``"flash_attention_2"``.
        quantize: ``"4bit"`` (language tower only), or None.
        trainable: Whether the adapter's parameters require gradients; those of the base never do.

    Returns:
        The model in evaluation mode: a `VisionModel`, or a `ChatModel` for text alone.

    Raises:
        UserError: If the model, the adapter or the base is not there, they do not belong together, or no family here
            is the model's.
    """
    config = read_config(name_or_path)
    family = family_of(config, str(name_or_path))
    with quiet_libraries():
        arguments = _arguments(device, dtype, attention, quantize, family.full_precision)
        loaded = _read(family.loads, name_or_path, config, arguments, family.full_precision, frozenset())
        if adapter is not None:
            loaded = put_adapter(loaded, Path(adapter), str(name_or_path), trainable=trainable)
        processor = load_processor(name_or_path, config, image_backend)
    model = family(loaded.eval(), processor, str(name_or_path))
    check_template(model, model_folder(name_or_path))
    if base is not None:
        model.difference = WeightDifference(model.base, load_plain(base, dtype=dtype), str(name_or_path), str(base))
    return model


def load_plain(name_or_path: str | Path, *, dtype: str | None = None) -> Any:
    """A whole transformers model of any family on the CPU, without processor, in its checkpoint's own dtype.

    Raises:
        UserError: If the model is not there.
    """
    config = read_config(name_or_path)
    arguments = _arguments("cpu", dtype or "float32", "sdpa", None)
    arguments = arguments if dtype else {**arguments, "dtype": "auto"}
    with quiet_libraries():
        return _read(family_of(config, str(name_or_path)).loads, name_or_path, config, arguments, unread=frozenset())


def load_whole(loads: Any, name_or_path: str | Path, config: Any, *, dtype: str) -> Any:
    """A frozen transformers model of any class, on the CPU: for judges, which have no family.

    Raises:
        UserError: If it is not there, lacks a tensor or has numbers in it that are not finite.
    """
    with quiet_libraries():
        return _read(loads, name_or_path, config, _arguments("cpu", dtype, "sdpa", None)).eval()


def load_tower(
    name_or_path: str | Path,
    blocks: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    image_backend: str = "pil",
    attention: str = "sdpa",
    quantize: str | None = None,
) -> ChatModel:
    """Load what training on hidden states needs: decoder blocks 0 to ``blocks - 1`` and no head.

    Tensors of other blocks and of the head are never read. Paths of what is left are those of the whole model.

    Args:
        name_or_path: As for `load_model`.
        blocks: How many decoder blocks to load.
        device: As for `load_model`.
        dtype: As for `load_model`.
        image_backend: As for `load_model`.
        attention: As for `load_model`.
        quantize: As for `load_model`.

    Returns:
        The model in evaluation mode; its ``logits`` are the last hidden state.

    Raises:
        UserError: If the model is not there or lacks a tensor.
    """
    config = read_config(name_or_path)
    family = family_of(config, str(name_or_path))
    whole = frozenset(map(place, skeleton(config, str(name_or_path)).base.state_dict()))
    family.cut_config(config, blocks)
    with quiet_libraries():
        arguments = _arguments(device, dtype, attention, quantize, family.full_precision)
        tower = _read(AutoModel, name_or_path, config, arguments, family.full_precision, whole)
        shell = skeleton(tower.config, str(name_or_path)).base
        setattr(shell, shell.base_model_prefix, tower)
        shell.lm_head = nn.Identity()
        for name in _MOVED_WITH_THE_TOWER:
            if hasattr(tower, name):
                setattr(shell, name, getattr(tower, name))
        processor = load_processor(name_or_path, config, image_backend)
    model = family(shell.eval(), processor, str(name_or_path))
    if len(model.decoder_blocks) > blocks:  # a family that can only be read whole
        model.keep_blocks(blocks, final_norm=True)
    check_template(model, model_folder(name_or_path))
    return model


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without transformers' progress bars and load reports, and without the hub's notes on retries.

    What failed in the end is raised, and said once.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    loggers = [getLogger("huggingface_hub"), getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            logging.enable_progress_bar()


def refuse_attention(attention: str, device: str, dtype: str) -> None:
    """Refuse flash attention where it cannot be run, before anything is loaded.

    Args:
        attention: As for `load_model`.
        device: Of the model.
        dtype: Of the model.

    Raises:
        UserError: If the device is no GPU, numbers have 32 bits, or the package is not here.
    """
    if attention != "flash_attention_2":
        return
    from transformers.utils import is_flash_attn_2_available

    lacks = ""
    if device == "cpu" or not torch.cuda.is_available():
        lacks = f"the device is `{device}`, and torch sees {torch.cuda.device_count()} GPUs"
    elif dtype not in ("bfloat16", "float16"):
        lacks = f"the dtype is {dtype}"
    elif not is_flash_attn_2_available():
        lacks = "the package is not here"
    if lacks:
        raise UserError(
            "`attention: flash_attention_2` needs a GPU, bfloat16 or float16, and the flash-attn package; "
            f"{lacks}; use `attention: sdpa`."
        )


def _arguments(
    device: str, dtype: str, attention: str, quantize: str | None, full_precision: Sequence[str] = ()
) -> Arguments:
    """What ``from_pretrained`` is told, whatever the family."""
    refuse_absent(device)
    number = getattr(torch, dtype)
    refuse_attention(attention, device, dtype)
    arguments = {
        "dtype": number,
        "attn_implementation": attention,
        "device_map": None if device == "cpu" else device if device == "auto" else {"": device},
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # they are told of, below
        "trust_remote_code": False,
    }
    return arguments if quantize is None else {**arguments, "quantization_config": four_bit(number, full_precision)}


def _read(
    model_type: Any,
    name_or_path: str | Path,
    config: Any,
    arguments: Arguments,
    full_precision: Sequence[str] = (),
    unread: Collection[str] | None = None,
) -> Any:
    """The frozen transformers model; a tensor that the checkpoint lacks is an error, not a random one.

    So is one that the model has no place for, unless ``unread`` has it, or is None (classifiers have other heads).
    """
    folder = model_folder(name_or_path, weights=True)
    check_sizes(config, refuse_stored_quantised(name_or_path), str(name_or_path))
    if (decoding := generation_config(folder, config)) is not None:
        arguments = {**arguments, "generation_config": decoding}
    try:
        model, report = model_type.from_pretrained(folder, config=config, output_loading_info=True, **arguments)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a library makes of damaged files, it is the files'
        raise not_loaded(name_or_path, error) from error
    over = () if unread is None else (key for key in report["unexpected_keys"] if place(str(key)) not in unread)
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("has other shapes in", report["mismatched_keys"]),
        ("has, beyond its own,", over),
    ):
        if names := sorted(key if isinstance(key, str) else str(key[0]) for key in keys):
            raise UserError(
                f"`{name_or_path}` {what} {len(names)} tensors of a {config.model_type} of its configuration, such as "
                f"`{names[0]}`; it is incomplete or another model's."
            )
    refuse_not_finite(model.named_parameters(), str(name_or_path), whole=True)
    model.requires_grad_(False)
    if "quantization_config" in arguments:
        assert_kept(model, full_precision)
    return model
