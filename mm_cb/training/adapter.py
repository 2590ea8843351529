"""Put an adapter on a model for training, and write the trained one as a folder that plain PEFT loads."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from mm_cb.core.files import give_usual_modes, write_json
from mm_cb.core.hub import repository_of
from mm_cb.models import ChatModel
from mm_cb.models.adapters import own_hashes, refuse_not_finite
from mm_cb.models.fingerprint import remember_base
from mm_cb.models.loading import quiet_libraries
from mm_cb.training.placement import KeptBlocks, assert_trained_modules

Family = TypeVar("Family", bound=ChatModel)


def add_adapter(
    model: Family, paths: Sequence[str], kept: KeptBlocks, *, r: int, lora_alpha: int, dropout: float
) -> Family:
    """Cut the model to what training needs and put a fresh LoRA (B = 0) on exactly ``paths``, see `put_lora`."""
    model.keep_blocks(kept.blocks, final_norm=kept.final_norm, head=kept.head)
    return put_lora(model, paths, LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=dropout))


def put_lora(model: Family, paths: Sequence[str], config: LoraConfig) -> Family:
    """Put a fresh LoRA on exactly ``paths``, whatever modules ``config`` names.

    The LoRA's A is drawn from torch's global generator.

    Returns:
        The model with its adapter, which is all that can train.
    """
    config = copy.copy(config)
    config.target_modules = set(paths)  # type: ignore[assignment]  # as PEFT itself keeps them
    config.layers_to_transform = config.layers_pattern = None
    config.fan_in_fan_out = isinstance(model.base.get_submodule(paths[0]), Conv1D)
    with quiet_libraries():
        adapted = get_peft_model(model.base, config)
    config.base_model_name_or_path = ""  # else PEFT looks the name up on the hub whenever a checkpoint is saved
    assert isinstance(adapted, PeftModel)
    assert_trained_modules(adapted, paths)
    return type(model)(adapted, model.processor, model.name, max_length=model.max_length)


def save_adapter(model: ChatModel, paths: Sequence[str], folder: Path) -> None:
    """Write ``adapter_model.safetensors``, ``adapter_config.json`` and ``base.json`` into ``folder``, each in one step.

    Where the model does not know its name, neither does the adapter, and there is no ``base.json``.

    The config names the full path of every adapted module: PEFT shortens long lists to what is unambiguous in the
    model at hand, which here is only the part of the model that training kept.

    Raises:
        UserError: If the training left numbers that are not finite.
    """
    trained = [(name, weight) for name, weight in model.model.named_parameters() if "lora_" in name]
    refuse_not_finite(trained, str(folder))
    config = model.model.peft_config["default"]
    config.base_model_name_or_path, config.revision = repository_of(model.name) if model.name else ("", None)
    config.target_modules = set(paths)
    part = folder / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    model.model.save_pretrained(str(part), save_embedding_layers=False)
    give_usual_modes(part)
    fields = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(folder / "adapter_config.json", {**fields, "target_modules": list(paths)})
    os.replace(part / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    if model.name:
        remember_base(folder, model.name, own_hashes(folder))
    shutil.rmtree(part)
