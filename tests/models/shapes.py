"""Checkpoints and tokenizers in the shapes that real ones have, a few kilobytes each."""

import re

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAVA_TEMPLATE = (  # the format of llava-hf/llava-v1.6-mistral-7b-hf: images, then texts; no <s>; answers end "</s> "
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
MISTRAL_TEMPLATE = (  # the format of mistralai/Mistral-7B-Instruct-v0.2: plain texts, <s> in front
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)

_BLOCK = (
    *("input_layernorm", "post_attention_layernorm"),
    *(f"mlp.{name}_proj" for name in ("down", "gate", "up")),
    *(f"self_attn.{name}_proj" for name in "koqv"),
)
_CLIP = (
    *(f"{name}.{part}" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for part in ("bias", "weight")),
    *(f"self_attn.{name}_proj.{part}" for name in ("k", "out", "q", "v") for part in ("bias", "weight")),
)
_NORMS = ("pre_layrnorm", "post_layernorm")
LLAVA_NAMES = {  # model.safetensors.index.json of llava-hf/llava-1.5-7b-hf, with N for the block
    *(f"language_model.model.layers.N.{name}.weight" for name in _BLOCK),
    *("language_model.lm_head.weight", "language_model.model.embed_tokens.weight", "language_model.model.norm.weight"),
    *(f"multi_modal_projector.linear_{n}.{part}" for n in (1, 2) for part in ("bias", "weight")),
    *(f"vision_tower.vision_model.encoder.layers.N.{name}" for name in _CLIP),
    "vision_tower.vision_model.embeddings.class_embedding",
    *(f"vision_tower.vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position")),
    *(f"vision_tower.vision_model.{name}.{part}" for name in _NORMS for part in ("bias", "weight")),
}
PUBLISHED = {  # the names, or what they begin with where one ends in a point
    "llava": LLAVA_NAMES,
    "llava_next": LLAVA_NAMES | {"image_newline"},  # llava-hf/llava-v1.6-mistral-7b-hf
    "qwen2_vl": {
        "lm_head.",
        "model.embed_tokens.",
        "model.layers.",
        "model.norm.",
        "visual.",
    },  # Qwen/Qwen2-VL-7B-Instruct
    "qwen2_5_vl": {"lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.", "visual."},
    "qwen3_vl": {"lm_head.", "model.language_model.", "model.visual."},  # Qwen/Qwen3-VL-8B-Instruct
}


def published(keys, kind):
    """Which entries of `PUBLISHED` the keys of a checkpoint are; a key that is none stands for itself."""
    numbered = {re.sub(r"\.\d+\.", ".N.", key) for key in keys}
    starts = tuple(name for name in PUBLISHED[kind] if name.endswith("."))
    return {next((start for start in starts if key.startswith(start)), key) for key in numbered}


def sentencepiece_like_tokenizer():
    """A BPE tokenizer with Llama's and Mistral's layout: byte fallback, ``▁`` for blanks, ``<s>`` put in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], initial_alphabet=["▁", *"[]/INST"]
    )
    tokenizer.train_from_iterator(
        ["[INST] what is in the picture [/INST] a red square", "tell me how to brew tea"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def relayout(folder, out, rename):
    """A copy of a checkpoint with every key renamed, as another version of transformers would have written it."""
    out.mkdir()
    save_file(
        {rename(key): value for key, value in tensors(folder).items()}, out / "model.safetensors", {"format": "pt"}
    )
    for file in (*folder.glob("*.json*"), *folder.glob("*.jinja")):
        if "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def old(key):
    """transformers < 4.52, and the hub: what version 5 writes, with the tower one level deeper."""
    return key.replace("vision_tower.", "vision_tower.vision_model.")


def new(key):
    """The layout of the modules in memory: transformers 4.52 to 4.57."""
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return f"model.{old(key)}".replace("language_model.model.", "language_model.")
