"""Checkpoints and tokenizers in the shapes that real ones have, a few kilobytes each."""

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
