"""The miniature's architecture: a real LLaVA-NeXT, only small (CLIP tower, projector, Mistral, any-res processor)."""

from __future__ import annotations

from typing import Any

from mm_cb.core.compat import prepare_torchvision
from mm_cb.miniature.language import vocabulary
from mm_cb.miniature.pictures import PANEL

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]")
PATCH = 14
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
    """A word-level tokenizer over the world's vocabulary; an unknown word becomes ``<unk>``."""
    prepare_torchvision()
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(r"[^A-Za-z]"), "isolated"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=["<image>", "[INST]", "[/INST]"],
        model_max_length=512,
        padding_side="left",
    )


def build_processor() -> Any:
    """The real any-res processor of LLaVA-NeXT on the Pillow backend, at 42-pixel tiles."""
    prepare_torchvision()
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
    prepare_torchvision()
    import torch
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
