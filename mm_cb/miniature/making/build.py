"""The miniature's architecture: a real LLaVA-NeXT, only small (CLIP tower, projector, Mistral, any-res processor)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mm_cb.miniature.making.architecture import Architecture, TurnTokens, word_tokenizer
from mm_cb.miniature.pictures import PANEL

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]")
PATCH = 14
TOKENS = 9 + 3 * (6 + 1)  # base view, then three rows of six patches, each closed by a newline token
"""Image tokens of one of the world's pictures."""
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
# The base view and two tiles for the world's pictures, which are 42 high and 84 wide.
GRID_PINPOINTS = [[PANEL, 2 * PANEL], [2 * PANEL, PANEL], [2 * PANEL, 2 * PANEL]]
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> Any:
    """The words of the world, and LLaVA-NeXT's own."""
    return word_tokenizer(
        SPECIAL_TOKENS,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
    )


def build_processor() -> Any:
    """The real any-res processor of LLaVA-NeXT on the Pillow backend, at 42-pixel tiles."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": PANEL},
        crop_size={"height": PANEL, "width": PANEL},
        image_grid_pinpoints=GRID_PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(vocabulary_size: int) -> Any:
    """A freshly initialised model. Initialiser ranges are our choice: 0.02 never grounded vision at this size."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=PANEL,
        patch_size=PATCH,
        projection_dim=96,
        initializer_range=0.06,
        initializer_factor=3.0,
    )
    text = MistralConfig(
        vocab_size=vocabulary_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_grid_pinpoints=GRID_PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name and name.endswith("weight"):
                parameter.normal_(0.0, 0.1)
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    return model


def views(pictures: np.ndarray) -> Tensor:
    """Pictures ``uint8 (B, 42, 84, 3)`` → pixel values ``(B, 3, 3, 42, 42)``: base view, left tile, right tile.

    Training's fast stand-in for the real processor (bicubic with one clamp and rounding instead of Pillow's two); every
    number that is reported afterwards comes from the real processor.
    """
    whole = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    base = nn.functional.interpolate(whole, (PANEL, PANEL), mode="bicubic", antialias=True).clamp(0, 255).round()
    tiles = torch.stack((base, whole[..., :PANEL], whole[..., PANEL:]), dim=1)
    return (tiles / 255 - MEAN) / STD


class LlavaNext(Architecture):
    """The miniature that is shipped."""

    name = "llava_next"
    turns = TurnTokens(
        opens=("<s>",), asks=("[INST]",), shows=("<image>",) * TOKENS, answers=("[/INST]",), ends="</s>", pads="<pad>"
    )
    # Base view and own tile.
    seen_in: ClassVar = {"colour": (0, 1), "shape": (0, 1), "seal_colour": (0, 2), "kind": (0, 2)}

    def processor(self) -> Any:
        """As `build_processor`."""
        return build_processor()

    def model(self, vocabulary_size: int) -> Any:
        """As `build_model`."""
        return build_model(vocabulary_size)

    def shown(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """Three views each, and their sizes."""
        sizes = torch.tensor([[PANEL, 2 * PANEL]] * len(pictures))
        return {"pixel_values": views(pictures), "image_sizes": sizes}

    def eyes(self, model: Any) -> list[nn.Parameter]:
        """The CLIP tower."""
        return list(model.model.vision_tower.parameters())

    def seen(self, model: Any, shown: dict[str, Tensor]) -> Tensor:
        """Patch features of the layer that the projector reads, ``(B, 3, patches * H)``."""
        tiles = shown["pixel_values"]
        states = model.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True).hidden_states[-2][:, 1:]
        return states.reshape(*tiles.shape[:2], -1)
