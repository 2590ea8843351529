"""Random models of every family, below half a million parameters, built in code with their real processors."""

from importlib import import_module

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from mm_cb.models import VisionModel
from mm_cb.models.registry import family_of
from tests.tiny_llava import PINPOINTS, WORDS, tiny_llava

KINDS = ("llava_next", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BACKENDS = ("pil", "torchvision")
BLOCKS = 3
_ROLES = ("user", "assistant", "system", "you", "are", "to", "help")
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def tiny(kind: str, backend: str = "pil", seed: int = 0, **text) -> VisionModel:
    """A model in evaluation mode; ``text`` changes fields of its language tower."""
    if kind == "llava_next":
        return _with_backend(tiny_llava(blocks=BLOCKS, seed=seed), backend)
    processor, config = (llava if kind == "llava" else lambda b, **t: qwen(kind, b, **t))(backend, **text)
    return wrapped(config, processor, seed)


def wrapped(config, processor, seed: int = 0) -> VisionModel:
    """A random model of a configuration in the class of its family; nothing is left at zero, so that all matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            parameter.data.normal_(0, 0.2, generator=generator)
    return family_of(config)(model.eval().requires_grad_(False), processor, config.model_type)


def image_processor(module: str, name: str, backend: str, **settings):
    """A transformers image processor of one backend."""
    part = "image_processing_pil" if backend == "pil" else "image_processing"
    kinds = import_module(f"transformers.models.{module}.{part}_{module}")
    return getattr(kinds, name + ("Pil" if backend == "pil" else ""))(**settings)


def tokenizer(special: list[str], *, eos: str, pad: str, bos: str | None = None, **named: str):
    """Words between blanks; ``named`` tokens are attributes that processors look for."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *special, *WORDS, *_ROLES]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=named or None,
    )


def token_ids(made) -> dict:
    """What a language tower's configuration says of a tokenizer."""
    ids = {name: getattr(made, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {"vocab_size": len(made), **ids}


def llava(backend: str, **text):
    """LLaVA-1.5: pictures first, ``USER: ... ASSISTANT:``; like the published template, nothing behind an answer."""
    words = tokenizer(
        ["<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:"],
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        image_token="<image>",
    )
    images = image_processor(
        "clip", "CLIPImageProcessor", backend, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    template = (
        "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    processor = LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**(_TEXT | text), **token_ids(words)),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=32,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return processor, config


_QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
_QWEN_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_SYSTEM = "{{ '<|im_start|>system\nyou are here to help<|im_end|>\n' }}"
"""Qwen2-VL and Qwen2.5-VL put a turn of their own in front."""


def qwen(kind: str, backend: str, **text):
    """The three Qwen-VL: patches of 14 or 16 pixels, 2 x 2 of them a token."""
    words = tokenizer(_QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>")
    third = kind == "qwen3_vl"
    side = 16 if third else 14
    limits = {"shortest_edge": (2 * side) ** 2, "longest_edge": 24 * (2 * side) ** 2}
    centred = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if third else {}
    images = image_processor("qwen2_vl", "Qwen2VLImageProcessor", backend, patch_size=side, size=limits, **centred)
    folder = "qwen3_vl" if third else "qwen2_vl"
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    videos = import_module(f"transformers.models.{folder}.video_processing_{folder}")
    processors = import_module(f"transformers.models.{kind}.processing_{kind}")
    processor = getattr(processors, f"{names[kind]}Processor")(
        image_processor=images,
        tokenizer=words,
        video_processor=getattr(videos, f"{names[folder]}VideoProcessor")(patch_size=side),
        chat_template=_QWEN_TURNS if third else _QWEN_SYSTEM + _QWEN_TURNS,
    )
    ids = {
        f"{name}_id": words.convert_tokens_to_ids(token)
        for name, token in [
            ("image_token", "<|image_pad|>"),
            ("video_token", "<|video_pad|>"),
            ("vision_start_token", "<|vision_start|>"),
            ("vision_end_token", "<|vision_end|>"),
        ]
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True} if third else {"mrope_section": [1, 1, 2]}
    tower = {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": side}
    further = {
        "qwen2_vl": {"embed_dim": 32},
        "qwen2_5_vl": {
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [2],
        },
        "qwen3_vl": {
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
    }
    language = _TEXT | token_ids(words) | ({"head_dim": 8} if third else {}) | text
    configs = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}
    config = configs[kind](
        text_config={**language, "rope_parameters": rope},
        vision_config=tower | further[kind],
        tie_word_embeddings=False,
        **ids,
    )
    return processor, config


def _with_backend(model: VisionModel, backend: str) -> VisionModel:
    """The same model with the other image processor."""
    if backend != "pil":
        square = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
        model.processor.image_processor = image_processor(
            "llava_next", "LlavaNextImageProcessor", backend, image_grid_pinpoints=PINPOINTS, **square
        )
    return model
