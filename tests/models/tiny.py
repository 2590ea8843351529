"""Random models of every family, below half a million parameters, built in code with their real processors."""

import json
from functools import partial
from importlib import import_module

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AyaVisionConfig,
    AyaVisionProcessor,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3Processor,
    Gemma4Config,
    Gemma4Processor,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Mistral3Config,
    MistralConfig,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from mm_cb.models import VisionModel
from mm_cb.models.registry import family_of
from tests.tiny_llava import PINPOINTS, WORDS, tiny_llava

KINDS = (
    "aya_vision",
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "pixtral",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
)
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
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "vision_use_head": False,
}


def tiny(kind: str, backend: str = "pil", seed: int = 0, **text) -> VisionModel:
    """A model in evaluation mode; ``text`` changes fields of its language tower."""
    if kind == "llava_next":
        return _with_backend(tiny_llava(blocks=BLOCKS, seed=seed), backend)
    makers = {
        "aya_vision": aya_vision,
        "gemma3": gemma3,
        "gemma4": gemma4,
        "internvl": internvl,
        "llava_onevision": onevision,
        "idefics3": idefics3,
        "llava": llava,
        "mistral3": mistral3,
        "pixtral": pixtral,
        "qwen3_5": qwen3_5,
        "smolvlm": smolvlm,
    }
    processor, config = makers.get(kind, partial(qwen, kind))(backend, **text)
    return wrapped(config, processor, seed)


def tiny_with(kind: str, tower: str, **text) -> VisionModel:
    """The same around a language tower of another type."""
    made = tiny(kind)
    config, words = made.base.config, made.processor.tokenizer
    config.text_config = AutoConfig.for_model(tower, **(_TEXT | text), **token_ids(words))
    return wrapped(config, made.processor)


def wrapped(config, processor, seed: int = 0) -> VisionModel:
    """A random model of a configuration in the class of its family; nothing is left at 0, no matrix at one number."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if not bool(parameter.any()) or (parameter.ndim > 1 and bool((parameter == parameter.flatten()[0]).all())):
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


def byte_tokenizer(kind, special: list[str], **settings):
    """A byte-level BPE tokenizer of one of transformers' classes, which some model types are always read with."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    learnt.train_from_iterator([" ".join([*WORDS, *_ROLES])], trainer)
    held = json.loads(learnt.to_str())["model"]
    made = kind(vocab=held["vocab"], merges=[tuple(pair) for pair in held["merges"]], **settings)
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def squeezed_llava(backend: str = "pil") -> VisionModel:
    """A LLaVA in front of SigLIP's tower and processor, as LLaVA-Interleave: pictures squeezed to the square, uncut."""
    made = tiny("llava")
    made.processor.image_processor = image_processor(
        "siglip", "SiglipImageProcessor", backend, size={"height": 28, "width": 28}
    )
    full = {"vision_feature_select_strategy": "full"}
    for name, value in {**full, "num_additional_image_tokens": 0}.items():
        setattr(made.processor, name, value)
    text, tower = made.base.config.text_config, SiglipVisionConfig(**_SIGLIP, image_size=28)
    held = {"image_token_index": made.base.config.image_token_id, "image_seq_length": 4, **full}
    return wrapped(LlavaConfig(text_config=text, vision_config=tower, **held), made.processor)


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


_GEMMA3_TURNS = (  # the published one
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- else -%}"
    "{{ raise_exception('Invalid content type') }}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)


def gemma3(backend: str, **text):
    """Gemma 3: one view of 56 x 56 pixels and four tokens; blocks of both types, with angles of their own."""
    words = tokenizer(
        [
            *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        ],
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    images = image_processor("gemma3", "Gemma3ImageProcessor", backend, size={"height": 56, "width": 56})
    processor = Gemma3Processor(images, words, chat_template=_GEMMA3_TURNS, image_seq_length=4)
    ids = words.convert_tokens_to_ids
    language = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    config = Gemma3Config(
        text_config=_TEXT | token_ids(words) | language | text,
        vision_config={**_SIGLIP, "image_size": 56},
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
    )
    return processor, config


_GEMMA4_TURNS = (  # what is left of the published one of the small models without tools and reasoning
    "{{- bos_token -}}{%- macro strip_thinking(text) -%}{%- set ns = namespace(result='') -%}"
    "{%- for part in text.split('<channel|>') -%}{%- if '<|channel>' in part -%}"
    "{%- set ns.result = ns.result + part.split('<|channel>')[0] -%}{%- else -%}"
    "{%- set ns.result = ns.result + part -%}{%- endif -%}{%- endfor -%}{{- ns.result | trim -}}{%- endmacro -%}"
    "{%- set loop_messages = messages -%}{%- if messages[0]['role'] == 'system' -%}"
    "{{- '<|turn>system\n' -}}{%- for item in messages[0]['content'] -%}{{- item['text'] | trim -}}{%- endfor -%}"
    "{{- '<turn|>\n' -}}{%- set loop_messages = messages[1:] -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}{{- '<|turn>' + role + '\n' }}"
    "{%- if message['content'] is string -%}{%- if role == 'model' -%}{{- strip_thinking(message['content']) -}}"
    "{%- else -%}{{- message['content'] | trim -}}{%- endif -%}{%- elif message['content'] is sequence -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{%- if role == 'model' -%}"
    "{{- strip_thinking(item['text']) -}}{%- else -%}{{- item['text'] | trim -}}{%- endif -%}"
    "{%- elif item['type'] == 'image' -%}{{- '<|image|>' -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<turn|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}{%- endif -%}"
)
_GEMMA4_LARGE = ("'<|turn>model\n' -}}{%- endif", "'<|turn>model\n<|channel>thought\n<channel|>' -}}{%- endif")
"""Prompts of the large ones end in a thinking block, which is empty."""


def gemma4(backend: str, **text):
    """A small Gemma 4: tokens of 12 x 12 pixels, at most 70; the upper two blocks take keys from the lower two."""
    words = tokenizer(
        [
            *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>"),
            *("<|audio|>", "<|audio>", "<audio|>", "<|video|>", "<|channel>", "<channel|>", "<|tool_response>"),
        ],
        bos="<bos>",
        eos="<turn|>",
        pad="<pad>",
        boi_token="<|image>",
        eoi_token="<image|>",
        image_token="<|image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    images = image_processor("gemma4", "Gemma4ImageProcessor", backend, max_soft_tokens=70, patch_size=4)
    made = {name: import_module(f"transformers.models.gemma4.{name}_gemma4") for name in _GEMMA4_OTHERS}
    others = {name: getattr(made[name], kind)() for name, kind in _GEMMA4_OTHERS.items()}
    sounds, videos = others["feature_extraction"], others["video_processing"]
    large = text.get("use_bidirectional_attention") is not None
    turns = _GEMMA4_TURNS.replace(*_GEMMA4_LARGE) if large else _GEMMA4_TURNS
    processor = Gemma4Processor(sounds, images, words, videos, chat_template=turns)
    ids = words.convert_tokens_to_ids
    language = {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": len(words),
        "final_logit_softcapping": 2.0,  # published: 30; here logits go up to 4, so that it matters
    }
    tower = {name: value for name, value in _SIGLIP.items() if name != "vision_use_head"}
    config = Gemma4Config(
        text_config=_TEXT | token_ids(words) | language | text,
        vision_config=tower
        | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 256},
        audio_config=None,
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        audio_token_id=ids("<|audio|>"),
        boi_token_id=ids("<|image>"),
        eoi_token_id=ids("<image|>"),
    )
    return processor, config


_GEMMA4_OTHERS = {
    "feature_extraction": "Gemma4AudioFeatureExtractor",
    "video_processing": "Gemma4VideoProcessor",
}

_INTERNVL_TURNS = (  # the published one
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def internvl(backend: str, **text):
    """InternVL: tiles of 28 x 28 pixels, one token each, at most four and a view of the whole."""
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        eos="<|im_end|>",
        pad="<|endoftext|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = image_processor(
        "got_ocr2", "GotOcr2ImageProcessor", backend, size={"height": 28, "width": 28}, max_patches=4
    )
    videos = import_module("transformers.models.internvl.video_processing_internvl").InternVLVideoProcessor()
    processor = InternVLProcessor(images, words, videos, image_seq_length=1, chat_template=_INTERNVL_TURNS)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InternVLConfig(
        text_config=Qwen2Config(**(_TEXT | text), **token_ids(words)),
        vision_config={**tower, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return processor, config


_AYA_TURNS = (  # what Command R7B's says of chats without tools, and pictures as their processor takes them
    "{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>you are here to help<|END_OF_TURN_TOKEN|>"
    "{% for message in messages %}<|START_OF_TURN_TOKEN|>{% if message['role'] == 'assistant' %}"
    "<|CHATBOT_TOKEN|><|START_RESPONSE|>{% else %}<|USER_TOKEN|>{% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)


def aya_vision(backend: str, **text):
    """Aya Vision: tiles of 28 x 28 pixels, one token each, at most four and a view of the whole."""
    turns = ["START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "SYSTEM_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN"]
    turns += ["START_RESPONSE", "END_RESPONSE", "START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK"]
    words = tokenizer(
        ["<PAD>", "<BOS_TOKEN>", "<image>", *(f"<|{turn}|>" for turn in turns), "TILE_GLOBAL", "TILE_1", "TILE_2"],
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
    )
    images = image_processor(
        "got_ocr2", "GotOcr2ImageProcessor", backend, size={"height": 28, "width": 28}, max_patches=4
    )
    processor = AyaVisionProcessor(images, words, patch_size=28, img_size=28, chat_template=_AYA_TURNS)
    language = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = AyaVisionConfig(
        text_config=Cohere2Config(**(_TEXT | language | text), **token_ids(words)),
        vision_config=SiglipVisionConfig(**_SIGLIP, image_size=28),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return processor, config


_ONEVISION_TURNS = (  # the published one of its Qwen2 models
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def onevision(backend: str, **text):
    """LLaVA-OneVision: tiles of 28 x 28 pixels and four tokens; grids of more than two tiles are scaled down."""
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image_token="<image>",
        video_token="<video>",
    )
    canvases = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = image_processor(
        "llava_onevision",
        "LlavaOnevisionImageProcessor",
        backend,
        size={"height": 28, "width": 28},
        image_grid_pinpoints=canvases,
    )
    videos = import_module("transformers.models.llava_onevision.video_processing_llava_onevision")
    processor = LlavaOnevisionProcessor(
        images,
        words,
        videos.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=_ONEVISION_TURNS,
    )
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**(_TEXT | text), **token_ids(words)),
        vision_config=SiglipVisionConfig(**_SIGLIP, image_size=28),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=canvases,
        vision_aspect_ratio="anyres_max_2",
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
        **_qwen_ids(words),
    )
    return processor, config


_QWEN3_5_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
"""As published: a thinking block in front of the last answer, open where the model is to think, and texts trimmed."""


def qwen3_5(backend: str, **text):
    """Qwen3.5: recurrent blocks and one of attention between them, and between two more."""
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    words = byte_tokenizer(Qwen3_5Tokenizer, [*_QWEN_TOKENS, "<think>", "</think>"], **ends)
    limits = {"shortest_edge": 32**2, "longest_edge": 24 * 32**2}
    centred = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = image_processor("qwen2_vl", "Qwen2VLImageProcessor", backend, patch_size=16, size=limits, **centred)
    videos = import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor(
        patch_size=16
    )
    processor = Qwen3VLProcessor(images, words, videos, chat_template=_QWEN3_5_TURNS)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    language = {
        "num_hidden_layers": 4,
        "initializer_range": 0.15,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 32,
        **{
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "rope_parameters": {**rope, "partial_rotary_factor": 0.25},
    }
    config = Qwen3_5Config(
        text_config=_TEXT | token_ids(words) | language | text,
        vision_config={
            **{"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 16, "intermediate_size": 48},
            **{"out_hidden_size": 32, "num_position_embeddings": 16, "initializer_range": 0.2},
        },
        tie_word_embeddings=False,
        **_qwen_ids(words),
    )
    return processor, config


def smolvlm(backend: str, **text):
    """SmolVLM: tiles of 56 pixels, at most 2 x 2 and the whole; the chat template that transformers brings."""
    module = import_module("transformers.models.smolvlm.processing_smolvlm")
    videos = import_module("transformers.models.smolvlm.video_processing_smolvlm").SmolVLMVideoProcessor()
    return _idefics3(
        "smolvlm",
        SmolVLMConfig,
        lambda images, words, **more: SmolVLMProcessor(images, words, videos, **more),
        module.DEFAULT_CHAT_TEMPLATE,
        backend,
        ["<|im_start|>", "<|im_end|>", "<end_of_utterance>"],
        **text,
    )


def idefics3(backend: str, **text):
    """Idefics3, with Llama 3's ends of texts beside the end of a turn; SmolVLM's first checkpoints are read as such."""
    template = import_module("transformers.models.smolvlm.processing_smolvlm").DEFAULT_CHAT_TEMPLATE
    template = template.replace("<|im_start|>", "<|begin_of_text|>")
    own = ["<|begin_of_text|>", "<pad>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    return _idefics3("idefics3", Idefics3Config, Idefics3Processor, template, backend, own, **text)


def _idefics3(kind, config, processor, template, backend, own, **text):
    """``own``: beginning of texts, padding, the tokenizer's end of texts and further ones of the configuration."""
    marks = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    around = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    around |= {"image_token": "<image>", "end_of_utterance_token": "<end_of_utterance>"}
    words = tokenizer(
        [*own, *around.values(), "User:", "Assistant:", *marks],
        bos=own[0],
        eos=own[2],
        pad=own[1],
        **around,
    )
    name = {"smolvlm": "SmolVLMImageProcessor", "idefics3": "Idefics3ImageProcessor"}[kind]
    images = image_processor(kind, name, backend, size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = words.convert_tokens_to_ids(own[2:])
    made = config(
        text_config=LlamaConfig(**(_TEXT | text), **token_ids(words) | {"eos_token_id": ends}),
        vision_config={**tower, "image_size": 56, "patch_size": 14},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return processor(images, words, image_seq_len=4, chat_template=template), made


_MISTRAL_TURNS = (
    "{{ bos_token }}{{ '[SYSTEM_PROMPT]you are here to help[/SYSTEM_PROMPT]' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral3(backend: str, **text):
    """Mistral 3: patches of 14 pixels, 2 x 2 of them a token, at most 4 x 4 tokens; a default system turn."""
    words, language, tower = _mistral(**text)
    config = Mistral3Config(
        text_config=language,
        vision_config=tower,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return _pixtral(words, backend, 2), config


def pixtral(backend: str, **text):
    """Pixtral: a LLaVA by its classes, with an image tower of its own and each patch a token."""
    words, language, tower = _mistral(**text)
    config = LlavaConfig(
        text_config=language,
        vision_config=tower,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _pixtral(words, backend, 1), config


def _mistral(**text):
    marks = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    turns = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    words = tokenizer(["<s>", "</s>", "<pad>", *marks.values(), *turns], bos="<s>", eos="</s>", pad="<pad>", **marks)
    language = MistralConfig(**(_TEXT | {"head_dim": 8, "sliding_window": None} | text), **token_ids(words))
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return words, language, PixtralVisionConfig(**tower, head_dim=16, image_size=112, patch_size=14)


def _pixtral(words, backend: str, merged: int):
    images = image_processor(
        "pixtral", "PixtralImageProcessor", backend, size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )
    return PixtralProcessor(images, words, patch_size=14, spatial_merge_size=merged, chat_template=_MISTRAL_TURNS)


def _qwen_ids(words) -> dict[str, int]:
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}


def _with_backend(model: VisionModel, backend: str) -> VisionModel:
    """The same model with the other image processor."""
    if backend != "pil":
        square = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
        model.processor.image_processor = image_processor(
            "llava_next", "LlavaNextImageProcessor", backend, image_grid_pinpoints=PINPOINTS, **square
        )
    return model
