"""A random LLaVA-NeXT of a few thousand parameters, built in code, with the shipped miniature's processor layout."""

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from mm_cb.models.llava_next import LlavaNextModel

WORDS = (
    "what is in the picture a red blue green square circle please tell me how to brew tea no i can not here it".split()
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "[INST]", "[/INST]"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)
PINPOINTS = [[42, 84], [84, 42], [84, 84]]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "[INST]", "[/INST]"],
    )


def tiny_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def tiny_llava(
    *, blocks: int = 3, hidden: int = 32, ffn: int = 64, vision_layers: int = 3, vision_hidden: int = 32, seed: int = 0
) -> LlavaNextModel:
    """A random model in evaluation mode; its tower has as many layers as the language model has blocks, or more."""
    processor = tiny_processor()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=42,
            patch_size=14,
            projection_dim=vision_hidden,
        ),
        text_config=MistralConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            sliding_window=None,
            initializer_range=0.2,
            pad_token_id=processor.tokenizer.pad_token_id,
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
    return LlavaNextModel(model.eval().requires_grad_(False), processor, "tiny")


def adapted_llava(pattern: str = "model.language_model.layers.1.mlp.{}_proj") -> LlavaNextModel:
    """One with a LoRA that changes a lot, on the modules that the pattern names."""
    model = tiny_llava()
    targets = [pattern.format(p) for p in ("gate", "up", "down")] if "{}" in pattern else [pattern]
    wrapped = get_peft_model(model.model, LoraConfig(r=4, target_modules=targets)).eval()
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(False)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return LlavaNextModel(wrapped, model.processor, "tiny")


def picture(seed: int = 0, size: tuple[int, int] = (84, 42)) -> Image.Image:
    """Random pixels; ``size`` is (width, height), as Pillow counts."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())
