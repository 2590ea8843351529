"""Adapters read strictly: a LoRA whose every setting is understood and every tensor finds its place, or none at all."""

import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import file_sha256
from mm_cb.core.folders import but_is, looks_like
from mm_cb.core.hub import repository_of
from mm_cb.core.paths import refuse_unusable
from mm_cb.core.reading import is_there, json_file
from mm_cb.core.records import JsonObject
from mm_cb.core.seal import seal_of
from mm_cb.core.weights import refuse_cut, zeros_at_end
from mm_cb.models.fingerprint import check_weights, refuse_edited
from mm_cb.models.patterns import pattern_fault

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BOOKKEEPING = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("peft_type", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config"),
)
_UNDERSTOOD = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights"),
)
"""Nothing but A and B on linear layers, which can be switched off, scaled and merged."""
_HALF = 2**-7
"""Beyond the relative error of any type here."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Numbers of 8 bits are another thing without their scales."""
_STARTS = (True, False, "gaussian", "orthogonal")
"""``init_lora_weights`` that leave the base's weights as they are; others (pissa, olora, ...) change them."""


def put_adapter(model: Any, folder: Path, name: str | None, *, trainable: bool = False) -> Any:
    """Put a PEFT adapter on the model it was trained for.

    Args:
        model: The transformers model.
        folder: The adapter's.
        name: What the model was loaded from, to compare with what the adapter was trained on; None = do not compare.
        trainable: Whether its parameters require gradients.

    Raises:
        UserError: If it is no adapter, another model's, of a kind that is not supported, or a tensor is missing, left
            over, not finite or of another shape.
    """
    config, tensors = read_settings(folder), read_tensors(folder)
    if name is not None:
        check_base(folder, name)
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    if (rank := max(config.r, *(config.rank_pattern or {}).values(), 0)) > largest:  # PEFT would make room for it
        raise _misfit(folder, f"its rank, {rank!s:.20}, is more than any side of its tensors, {largest}")
    if fault := pattern_fault(config, (path for path, _ in model.named_modules())):
        raise UserError(f"`{folder / SETTINGS}`: {fault}.")
    targets = config.target_modules  # PEFT rewrites it
    config.inference_mode = not trainable
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*missing adapter keys")  # said below
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT takes what the module's kind wants
            wrapped = PeftModel.from_pretrained(
                model, str(folder), config=config, is_trainable=trainable, torch_device=str(model.device)
            )
        check_places(wrapped, tensors, folder)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _misfit(folder, _shapes(str(error))) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, re.error) as error:
        raise _misfit(folder, one_line(str(error))[:300]) from error
    adapted: Any = wrapped.base_model
    _check_names(folder, adapted.targeted_module_names, targets, config)
    return wrapped


def read_settings(folder: Path) -> LoraConfig:
    """The configuration of an adapter folder, every field of it understood and as its training wrote it.

    Raises:
        UserError: Naming the file and the field.
    """
    refuse_unusable(folder, "adapter")
    absent = [name for name in (SETTINGS, WEIGHTS) if not is_there(folder / name, "adapter's file")]
    if absent:
        came = but_is(folder) if len(absent) == 2 else f"; {absent[0]} is missing{looks_like(folder / absent[0])}"
        raise UserError(f"`{folder}` is not an adapter: expected a folder with {SETTINGS} and {WEIGHTS}{came}.")
    file, fields = folder / SETTINGS, _fields(folder)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"`{file}`: `peft_type` must be LORA, got {fields.get('peft_type')!r:.80}.")
    plain = LoraConfig()
    for key, value in fields.items():
        inert = value is None or value is False or value in ([], {}, "none")
        if key in _BOOKKEEPING or key in _UNDERSTOOD or inert or value == getattr(plain, key, object()):
            continue
        known = hasattr(plain, key)
        raise UserError(
            f"`{file}`: `{key}` is {'not supported' if known else 'unknown'}, got {value!r:.80}; an adapter here is a "
            "plain LoRA" + (", without it." if known else ": remove the key if nothing depends on it.")
        )
    if (start := fields.get("init_lora_weights", True)) not in _STARTS:
        raise UserError(
            f"`{file}`: `init_lora_weights` {start!r:.80} changes the base's weights; convert the adapter to a plain "
            "LoRA (PEFT's `path_initial_model_for_weight_conversion`)."
        )
    _check_numbers(file, fields)
    _check_modules(file, fields)
    refuse_edited(file, lambda: _settings_sha256(fields))
    try:
        return LoraConfig(**{key: fields[key] for key in (*_UNDERSTOOD, *_BOOKKEEPING[:4]) if key in fields})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"`{file}` must be the configuration of a LoRA: {error}") from error


def _fields(folder: Path) -> JsonObject:
    file = folder / SETTINGS
    fields: JsonObject = json_file(file, dict, "a JSON object")
    return fields


def _settings_sha256(fields: JsonObject) -> str:
    """SHA-256 of all that decides what an adapter does: a copy of its base may have another name."""
    return seal_of({key: value for key, value in fields.items() if key not in _BOOKKEEPING})


def own_hashes(folder: Path) -> dict[str, str]:
    """File of an adapter → the hash that `read_settings` and `read_tensors` find as long as nobody changes it."""
    return {SETTINGS: _settings_sha256(_fields(folder)), WEIGHTS: file_sha256(folder / WEIGHTS)}


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two folders hold one adapter's weights, as files or, stored in other words or half precision, as numbers.

    Raises:
        UserError: As `read_settings` and `read_tensors`.
    """
    read_settings(other)
    if file_sha256(one / WEIGHTS) == file_sha256(other / WEIGHTS):
        return True
    mine, yours = read_tensors(one), read_tensors(other)
    return mine.keys() == yours.keys() and all(
        held.shape == yours[name].shape and torch.allclose(held.float(), yours[name].float(), rtol=_HALF, atol=0)
        for name, held in mine.items()
    )


def _check_numbers(file: Path, fields: JsonObject) -> None:
    """Refuse ranks and scales that are none, before PEFT computes with them."""
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise UserError(f"`{file}`: `{name}` must be an object of numbers, got {pattern!r:.80}.")
    ranks = {"r": fields.get("r", 8), **{f"rank_pattern.{k}": v for k, v in patterns["rank_pattern"].items()}}
    for name, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"`{file}`: `{name}` must be a whole number from 1 on, got {value!r:.80}.")
    alphas = {"lora_alpha": fields.get("lora_alpha", 8)}
    alphas |= {f"alpha_pattern.{key}": value for key, value in patterns["alpha_pattern"].items()}
    for name, value in alphas.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise UserError(f"`{file}`: `{name}` must be a finite number from 0 on, got {value!r:.80}.")
    dropout = fields.get("lora_dropout", 0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"`{file}`: `lora_dropout` must be a number from 0 to below 1, got {dropout!r:.80}.")
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(fields.get(name, False), bool | None):
            raise UserError(f"`{file}`: `{name}` must be true or false, got {fields[name]!r:.80}.")


def _check_modules(file: Path, fields: JsonObject) -> None:
    """Refuse names and patterns of modules that are none, before PEFT and `re` stumble over them."""
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if wrong := [one for one in listed if not isinstance(one, str)]:
            raise UserError(f"`{file}`: `{name}` must be a text or a list of texts, got {wrong[0]!r:.80}.")
        if name == "target_modules" and not (listed and all(listed)):
            raise UserError(f"`{file}`: `{name}` must name the modules that the adapter changes, got {value!r:.80}.")
        if isinstance(value, str) or name == "layers_pattern":  # in a list of modules stand names
            _check_patterns(file, name, listed)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(file, name, fields.get(name) or {})
    layers = fields.get("layers_to_transform")
    for one in [] if layers is None else layers if isinstance(layers, list) else [layers]:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise UserError(
                f"`{file}`: `layers_to_transform` must be a layer or a list of layers, whole numbers from 0 on, got "
                f"{one!r:.80}."
            )


def _check_patterns(file: Path, name: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            glob = "; `*` alone matches nothing, any characters are `.*`" if pattern.startswith("*") else ""
            raise UserError(
                f"`{file}`: `{name}` must be a regular expression of Python, got {pattern!r:.80} ({error}){glob}."
            ) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by the file's own names, on the CPU.

    Raises:
        UserError: If the file is damaged, empty or not as its training wrote it, or numbers in it are not finite.
    """
    file = folder / WEIGHTS
    try:
        refuse_cut(file)
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"`{file}` must be a safetensors file, but it cannot be read: {error}") from error
    if not tensors:
        raise UserError(f"`{file}` must hold the adapter's tensors, but it holds none.")
    if other := [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]:
        raise UserError(
            f"`{file}` must hold tensors of float32, bfloat16 or float16, but {len(other)} are of another type, such "
            f"as `{other[0]}` ({tensors[other[0]].dtype})."
        )
    refuse_not_finite(tensors.items(), str(file))
    _refuse_zeros(file, tensors)
    refuse_edited(file, lambda: file_sha256(file))
    return tensors


def _refuse_zeros(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of which a part never arrived: a file made at its full length holds zeros there.

    No training leaves an A of zeros. A B of zeros is one that no training reached: where all are, the adapter does
    nothing, which is told by who measures it; where some are, as those of layers without a gradient, it is told here.
    """
    zero = sorted(name for name, tensor in tensors.items() if not tensor.any())
    ends = zeros_at_end(file)
    if any("lora_B" not in name for name in zero) or (ends and not zero):
        came = f"{len(zero)} of {len(tensors)} are zeros alone, such as `{zero[0]}`" if zero else f"it ends in {ends}"
        raise UserError(f"`{file}` must hold whole tensors, but {came}: it did not arrive whole; download it again.")
    if 0 < len(zero) < sum("lora_B" in name for name in tensors):
        warnings.warn(
            f"`{file}`: {len(zero)} of {len(tensors)} tensors are zeros alone, such as `{zero[0]}`: their modules "
            "change nothing. No training reached them, or the file is damaged.",
            stacklevel=3,
        )


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], where: str, *, whole: bool = False) -> None:
    """Refuse weights with NaN or infinity among them.

    Args:
        tensors: Names and weights.
        where: What holds them, for messages.
        whole: Whether to warn of matrices of zeros alone as well, of which a trained model has none: a file
            that did not arrive whole has them, but also a layer that somebody switched off.

    Raises:
        UserError: With the number of such tensors and the first name.
    """
    ends = [(name, tensor.ndim, _ends(tensor)) for name, tensor in tensors]
    if wrong := [name for name, _, found in ends if not all(map(math.isfinite, found))]:
        raise UserError(
            f"`{where}` must hold finite numbers, but {len(wrong)} tensors have NaN or infinity in them, such as "
            f"`{wrong[0]}`; its training diverged or the file is damaged."
        )
    zero = [name for name, sides, found in ends if sides > 1 and name.endswith(".weight") and found == (0, 0)]
    if whole and zero:
        warnings.warn(
            f"`{where}`: {len(zero)} matrices are zeros alone, such as `{zero[0]}`. If nobody made them so, the "
            "model did not arrive whole: download it again.",
            stacklevel=3,
        )


def _ends(tensor: Tensor) -> tuple[float, ...]:
    """The least and the largest number; none of a tensor that holds no plain ones."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() == 1:
        return ()
    return tuple(map(float, torch.aminmax(tensor.detach())))  # without a copy of a large matrix


def check_places(wrapped: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Make sure that an adapter's tensors are exactly those of its model, each once.

    Args:
        wrapped: The ``PeftModel``; it gets the tensors.
        tensors: What the file holds.
        folder: The adapter's, for messages.

    Raises:
        UserError: With the number of tensors and the first name.
    """
    try:
        found: Any = set_peft_model_state_dict(wrapped, dict(tensors))
    except RuntimeError as error:
        raise _misfit(folder, _shapes(str(error))) from error
    adapted = len(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    missing = sorted(key for key in found.missing_keys if "lora_" in key)
    if missing:
        raise _misfit(folder, f"{len(missing)} tensors of {adapted} are missing, such as `{missing[0]}`")
    if left_over := sorted(found.unexpected_keys):
        raise _misfit(folder, f"{len(left_over)} tensors belong to no module, such as `{left_over[0]}`")
    if len(tensors) != adapted:
        raise _misfit(folder, f"it holds {len(tensors)} tensors, its modules take {adapted}: some are there twice")


def _shapes(message: str) -> str:
    """Torch's account of shapes that differ, as one clause."""
    wrong = re.findall(r"size mismatch for ([\w.]+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", message)
    if not wrong:
        return message[:300]
    name, came, expected = wrong[0]
    return f"{len(wrong)} tensors have another shape, such as `{name}`: expected [{expected}], got [{came}]"


def _check_names(folder: Path, adapted: Iterable[str], targets: Any, config: LoraConfig) -> None:
    """Make sure that every module that the configuration names is there: PEFT passes over those that are not."""
    paths = list(adapted)
    names = [] if targets is None or isinstance(targets, str) else sorted(targets)
    absent = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    for pattern in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        if not any(re.fullmatch(rf"(.*\.)?{pattern.removeprefix('^')}", path) for path in paths):
            absent.append(pattern)
    if absent:
        raise _misfit(folder, f"its {SETTINGS} names {len(absent)} modules that are not there, such as `{absent[0]}`")


def _misfit(folder: Path, why: str) -> UserError:
    return UserError(
        f"the adapter in `{folder}` does not fit this model: {why.rstrip('. ')}. Give the model it was trained for."
    )


def check_base(adapter: Path, name: str) -> None:
    """Make sure that an adapter was trained for the model that ``name`` stands for.

    Names are compared, and folders by their last part, because a copy of a model may lie elsewhere; then a sample of
    the weights, see `mm_cb.models.fingerprint`. An adapter that names no base passes.

    Raises:
        UserError: Naming both models.
    """
    trained, here = _fields(adapter).get("base_model_name_or_path") or "", repository_of(name)[0]
    if not isinstance(trained, str):
        raise UserError(f"`{adapter / SETTINGS}`: `base_model_name_or_path` must be a name, got {trained!r:.80}.")
    if trained and os.path.basename(os.path.normpath(trained)) != os.path.basename(os.path.normpath(here)):
        raise UserError(
            f"the adapter in `{adapter}` was trained for `{trained}`, the model is `{name}`; give the same base, or "
            "correct base_model_name_or_path in its adapter_config.json if it is a copy."
        )
    check_weights(adapter, name)
