import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.models.shapes import MISTRAL_TEMPLATE
from tests.tiny_llava import tiny_llava, tiny_tokenizer

SIZES = {
    "mistral": lambda vocab: MistralForCausalLM(
        MistralConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ),
    "llama": lambda vocab: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ),
    "gpt2": lambda vocab: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-NeXT as its files."""
    path = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_llava()
    model.model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


def save_text_model(folder, kind):
    tokenizer = tiny_tokenizer()
    if kind != "gpt2":
        tokenizer.chat_template = MISTRAL_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SIZES[kind](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("text") / "mistral", "mistral")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("text") / "gpt2", "gpt2")
