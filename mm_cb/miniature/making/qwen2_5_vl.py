"""A miniature Qwen2.5-VL: windows in its image tower, a merger, places in space, a default system turn.

Its language blocks begin as the shipped miniature's: Qwen's are Mistral's with biases (0 here), and to a text whose
places are the same in time, row and column they do the same. So it has only new eyes, a new template and the places of
pictures to learn, in a third of the steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mm_cb.miniature import NAME
from mm_cb.miniature.making.architecture import Architecture, PretrainingSize, TurnTokens, word_tokenizer
from mm_cb.miniature.making.build import MEAN, STD
from mm_cb.miniature.pictures import PANEL
from mm_cb.models import load_model

_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("system", "user", "assistant"),
)
_SYSTEM = ("i", "will", "help", ".")
_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\ni will help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIDE, _MERGE, _TIME = 7, 2, 2
"""Pixels along a patch, patches along a token, frames of a still picture: the world's pictures are 6 x 12 patches."""
_GRID = (PANEL // _SIDE, 2 * PANEL // _SIDE)
_TOKENS = _GRID[0] * _GRID[1] // _MERGE**2
_WIDTH = 96


class Qwen25VL(Architecture):
    """A ``Qwen2_5_VLForConditionalGeneration``; each panel of a picture is a window of its image tower."""

    name = "qwen2_5_vl"
    turns = TurnTokens(
        opens=("<|im_start|>", "system", *_SYSTEM, "<|im_end|>"),
        asks=("<|im_start|>", "user"),
        shows=("<|vision_start|>", *["<|image_pad|>"] * _TOKENS, "<|vision_end|>"),
        answers=("<|im_end|>", "<|im_start|>", "assistant"),
        ends="<|im_end|>",
        pads="<|endoftext|>",
    )
    size: ClassVar = PretrainingSize(sight_steps=150, knowledge_steps=400, knowledge_rate=1e-3)
    kept_as = torch.float16
    seen_in: ClassVar = {name: (0,) for name in ("colour", "shape", "seal_colour", "kind")}

    def processor(self) -> Any:
        """Pictures of at most 42 x 84 pixels, which those of the world are and stay."""
        from transformers import Qwen2_5_VLProcessor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        patches: dict[str, Any] = {"patch_size": _SIDE, "merge_size": _MERGE, "temporal_patch_size": _TIME}
        limits = {"shortest_edge": (_SIDE * _MERGE) ** 2, "longest_edge": 2 * PANEL**2}
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessorPil(size=limits, **patches),
            tokenizer=word_tokenizer(
                _SPECIAL_TOKENS,
                eos_token="<|im_end|>",  # noqa: S106
                pad_token="<|endoftext|>",  # noqa: S106
            ),
            video_processor=Qwen2VLVideoProcessor(**patches),
            chat_template=_CHAT_TEMPLATE,
        )

    def model(self, vocabulary_size: int) -> Any:
        """As `Architecture.model`: 1.1 million parameters."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        ids = {token: i for i, token in enumerate(_SPECIAL_TOKENS)}
        ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
        text = {
            "vocab_size": vocabulary_size,
            "hidden_size": _WIDTH,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
            **ends,
        }
        vision = {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_heads": 4,
            "out_hidden_size": _WIDTH,
            "patch_size": _SIDE,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": _TIME,
            "window_size": PANEL,
            "fullatt_block_indexes": [2],
            "initializer_range": 0.06,
        }
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        for name, id_ in ends.items():
            setattr(model.generation_config, name, id_)
        _teach_language(model)
        return model

    def shown(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """Patches of all pictures behind each other, and their grids; exactly as the processor cuts them."""
        (rows, columns), count = _GRID, len(pictures)
        levels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        cut = levels.view(count, 3, rows // _MERGE, _MERGE, _SIDE, columns // _MERGE, _MERGE, _SIDE)
        still = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, _TIME, -1, -1)
        grids = torch.tensor([[1, rows, columns]] * count)
        return {"pixel_values": still.reshape(count * rows * columns, -1), "image_grid_thw": grids}

    def told(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Which tokens stand for pictures: their places are in space."""
        return {"mm_token_type_ids": (input_ids == _SPECIAL_TOKENS.index("<|image_pad|>")).int()}

    def eyes(self, model: Any) -> list[nn.Parameter]:
        """The image tower without what merges its patches to tokens."""
        tower = model.model.visual
        return [*tower.patch_embed.parameters(), *tower.blocks.parameters()]

    def seen(self, model: Any, shown: dict[str, Tensor]) -> Tensor:
        """All patches of a picture, ``(B, 1, patches * H)``."""
        states = model.model.visual(shown["pixel_values"], shown["image_grid_thw"]).last_hidden_state
        return states.reshape(len(shown["image_grid_thw"]), 1, -1)


_HEIRS = {"<|endoftext|>": "<pad>", "<|im_end|>": "</s>", "user": "[INST]", "assistant": "[/INST]"}
"""Tokens of the template that begin as the shipped miniature's of the same use."""


@torch.no_grad()
def _teach_language(model: Any) -> None:
    """Copy the shipped miniature's language blocks, and its embedding and head of every word; biases become 0."""
    taught = load_model(NAME)
    known, words = taught.processor.tokenizer.get_vocab(), word_tokenizer(_SPECIAL_TOKENS).get_vocab()
    language = {name: value for name, value in taught.tower.state_dict().items() if name != "embed_tokens.weight"}
    left = model.model.language_model.load_state_dict(language, strict=False)
    assert not left.unexpected_keys and all(key.endswith((".bias", "embed_tokens.weight")) for key in left.missing_keys)
    for name, value in model.model.language_model.named_parameters():
        if name.endswith(".bias"):
            value.zero_()
    pairs = [(id_, known[heir]) for word, id_ in words.items() if (heir := _HEIRS.get(word, word)) in known]
    new, old = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    for mine, its in (
        (model.get_input_embeddings(), taught.base.get_input_embeddings()),
        (model.lm_head, taught.base.lm_head),
    ):
        mine.weight[new] = its.weight[old]
