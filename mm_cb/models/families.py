"""What a name stands for: its configuration, its family, its shapes, its processor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig

from mm_cb.core.embedded import guest_names
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.folders import but_is
from mm_cb.core.reading import BOM, file_bytes, json_file, read_text, refuse_repeated_keys
from mm_cb.models.base import ChatModel
from mm_cb.models.cache import ADAPTER, find_file, model_folder, weights_fault
from mm_cb.models.laws import CONFIG, OLD_PROCESSOR, PROCESSOR, check_config, check_image_token, check_kinds
from mm_cb.models.registry import family_of
from mm_cb.models.vision import VisionModel

_TOKENIZER = "tokenizer_config.json"
_SETTINGS = ("*config.json", "special_tokens_map.json")
"""Files of a model that other libraries read and that decide what it is and says."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_QUOTED = 300
"""Characters of what a library says."""


def read_config(name_or_path: str | Path) -> Any:
    """The transformers configuration of a model, whose numbers fit one another.

    Raises:
        UserError: If there is none, it is behind a gate that this machine has no key to, or a field of it cannot stand.
    """
    folder = model_folder(name_or_path)
    if (folder / CONFIG).is_file() and (folder / ADAPTER).is_file():  # transformers would put it on unasked
        raise UserError(
            f"`{name_or_path}` must be a model alone, it holds an adapter's {ADAPTER} beside its {CONFIG}; move the "
            "adapter's files into a folder of their own and give that one as `--adapter`."
        )
    for file in sorted(one for pattern in _SETTINGS for one in folder.glob(pattern)):
        refuse_repeated_keys(file)
    try:
        held, _ = PretrainedConfig.get_config_dict(folder)
        check_kinds(held, str(name_or_path))
        _refuse_unknown_type(held, name_or_path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever a library makes of a damaged file, it is the file's
        raise not_loaded(name_or_path, error) from error
    if "text_config" in getattr(type(config), "sub_configs", {}) and not {"text_config", "hidden_size"} & held.keys():
        family_of(config, str(name_or_path))  # a type that is not here is told first
        raise UserError(
            f"`config.json` of `{name_or_path}` must hold the language model's sizes in `text_config`, it has none; "
            "transformers would take those of another model. Fetch the file again."
        )
    try:
        check_config(config, str(name_or_path))
    except UserError:
        if hasattr(config, "vision_config"):
            family_of(config, str(name_or_path))  # as above; mllama's token for pictures lies behind its vocabulary
        raise
    return config


def _refuse_unknown_type(held: Mapping[str, Any], name_or_path: str | Path) -> None:
    """Refuse a type that this transformers does not have, by its name; who brings code of its own is told elsewhere."""
    kind = held.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and "auto_map" not in held:
        raise UserError(
            f"`{name_or_path}` is of the type `{kind[:80]}` (`model_type` in {CONFIG}), which transformers "
            f"{transformers.__version__} does not know; correct it, or take a version that does."
        )


def sees(name_or_path: str | Path) -> bool:
    """Whether a model takes pictures, from its configuration alone.

    Raises:
        UserError: If there is no such model, or no family here is its own.
    """
    return issubclass(family_of(read_config(name_or_path), str(name_or_path)), VisionModel)


def skeleton(config: Any, name: str = "", processor: Any = None) -> ChatModel:
    """The whole model as shapes alone, on the meta device: no weight is read and no memory used.

    Raises:
        UserError: If no family here has models of this type.
    """
    family = family_of(config, name)
    try:
        with torch.device("meta"):
            shape = family.loads.from_config(config)
    except Exception as error:  # whatever a library makes of a configuration, it is the configuration's
        raise not_loaded(name, error) from error
    return family(shape, processor, name)


def load_processor(name_or_path: str | Path, config: Any, image_backend: str = "pil") -> Any:
    """The processor, with exactly the image backend asked for (transformers would fall back to another one).

    Raises:
        UserError: If it is not there, a file of it is damaged or lacks something, or the backend is not available.
    """
    folder, family = model_folder(name_or_path), family_of(config, str(name_or_path))
    _check_settings(folder)
    try:
        processor = family.read_processor(str(folder), image_backend)
    except Exception as error:  # whatever a library makes of a damaged file, it is the file's
        raise not_loaded(name_or_path, error) from error
    images = getattr(processor, "image_processor", None)
    came = "pil" if type(images).__name__.endswith("Pil") else "torchvision"
    if images is not None and came != image_backend:
        raise UserError(f"image backend `{image_backend}` is not available here, only `{came}`.")
    settle_padding(processor.tokenizer, folder)
    _check_tokenizer(processor.tokenizer, config.get_text_config(), folder)
    if images is not None:
        token = family(torch.nn.Identity(), processor, str(name_or_path)).soft_token
        check_image_token(processor, config, token, folder)
    family.check_processor(processor, config, folder)
    return processor


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer that lies in a folder or on the hub, with a padding token.

    Raises:
        UserError: If it is not there, or a file of it is damaged or lacks something.
    """
    folder = model_folder(name_or_path)
    _check_settings(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise not_loaded(name_or_path, error) from error
    settle_padding(tokenizer, folder)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds any file of a tokenizer; one may hold the configuration alone, to plan with."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def tokenizer_is_here(name_or_path: str | Path) -> bool:
    """Whether any file of a model's tokenizer is on this machine; the hub is not asked."""
    return any(find_file(name_or_path, name) for name in _TOKENIZERS)


def settle_padding(tokenizer: Any, folder: Path) -> None:
    """Have a tokenizer pad with its end-of-sequence token where it has no padding token.

    Raises:
        UserError: If it has neither.
    """
    # what is too long is refused by us, in other words
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"`{folder / _TOKENIZER}` must name a `pad_token` or an `eos_token`, it is absent or has none.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_tokenizer(tokenizer: Any, config: Any, folder: Path) -> None:
    """Refuse a tokenizer that cannot be the model's: far too few tokens, or ids that the model has no row for."""
    if 2 * len(tokenizer) < config.vocab_size:
        raise UserError(
            f"the tokenizer of `{folder}` has {len(tokenizer)} tokens, its model {config.vocab_size}; its files are "
            "incomplete: get tokenizer.json."
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda one: one[1])
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer of `{folder}` gives `{token}` the id {largest}, its model has {config.vocab_size} tokens "
            "(`vocab_size` in config.json); give the model its own tokenizer."
        )


def _check_settings(folder: Path) -> None:
    """Refuse a longest input that is no number, with which transformers compares, and sides that are none."""
    try:
        held = json.loads(file_bytes(folder / _TOKENIZER))
    except (OSError, ValueError, RecursionError):  # whoever reads it next says so
        return
    if not isinstance(held, dict):
        return
    most = held.get("model_max_length")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int | float) or not most >= 1):
        raise UserError(
            f"`{folder / _TOKENIZER}`: `model_max_length` must be a number of tokens from 1 on, got {most!r:.80}; "
            "correct it or leave it out."
        )
    for field in ("padding_side", "truncation_side"):
        if held.get(field, "left") not in ("left", "right"):
            raise UserError(f"`{folder / _TOKENIZER}`: `{field}` must be left or right, got {held[field]!r:.80}.")


def not_loaded(name_or_path: str | Path, error: Exception) -> UserError:
    """The user's error for a model whose files are here but cannot be read."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"`{name_or_path}` is read by code of its own, which is never run here (trust_remote_code is off); use a "
            "model of transformers' own code."
        )
    folder = Path(name_or_path)
    if folder.is_dir() and (fault := _fault_of(folder)):
        return UserError(f"cannot load a model from `{name_or_path}`: {fault}")
    said = one_line(f"{type(error).__name__}: {error}")
    return UserError(
        f"cannot load a model from `{name_or_path}` (expected {guest_names()}, or a model of transformers' own code "
        f"with safetensors, in a folder or on the hub): {said if len(said) <= _QUOTED else said[:_QUOTED] + ' ...'}"
    )


def _fault_of(folder: Path) -> str | None:
    """What of a folder's files is absent or damaged, which libraries tell at length or not at all."""
    if not (folder / CONFIG).is_file():
        return f"it must hold {CONFIG}, it has none{but_is(folder)}."
    for file in sorted(folder.glob("*.json")):
        try:
            if file_bytes(file).startswith(BOM):
                return f"`{file}` begins with a byte order mark, which transformers cannot read; save it without."
            held = json_file(file, dict, "a JSON object")
        except UserError as error:
            return str(error)
        if file.name == "tokenizer.json" and not isinstance(held.get("model"), dict):
            return f"`{file}` must hold a tokenizer with its `model`, it has none; fetch the file again."
    for file in sorted(folder.glob("*.jinja")):
        try:
            read_text(file, "chat template")
        except UserError as error:
            return str(error)
    if fault := weights_fault(folder):
        return fault
    if not has_tokenizer(folder):
        return f"it must hold its tokenizer, {_TOKENIZERS[0]}; it has none."
    config = json_file(folder / CONFIG, dict, "a JSON object")
    if not isinstance(kind := config.get("model_type"), str):
        return f"`{folder / CONFIG}` must name the model's `model_type`, got {kind!r:.80}."
    if "vision_config" not in config or (folder / OLD_PROCESSOR).is_file():
        return None
    if not (folder / PROCESSOR).is_file():
        return f"it must hold {PROCESSOR} (or {OLD_PROCESSOR}): what its pictures become; it has neither."
    if not isinstance(json_file(folder / PROCESSOR, dict, "a JSON object").get("image_processor"), dict):
        return f"`{folder / PROCESSOR}` must say in `image_processor` what its pictures become, it does not."
    return None
