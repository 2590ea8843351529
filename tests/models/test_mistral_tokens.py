"""LLaVA-NeXT-Mistral's chat form on the real token ids, against Mistral's own tokenizer library.

The vocabulary is that of Mistral-7B-Instruct v0.1 and v0.2 (version 1, 32 000 pieces), which ``mistral-common`` brings.
"""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mm_cb.models import TextModel, TokenRole
from mm_cb.models.chat import chat
from mm_cb.models.llava_next import LlavaNextModel
from mm_cb.models.text import TextProcessor
from tests.image_attacks.oracles import oracle
from tests.models.shapes import LLAVA_TEMPLATE, MISTRAL_TEMPLATE
from tests.tiny_llava import picture, tiny_llava, tiny_processor

BOS, EOS, IMAGE = 1, 2, 32_000
ADDED = {0: "<unk>", BOS: "<s>", EOS: "</s>", IMAGE: "<image>", 32_001: "<pad>"}
"""The special tokens of llava-hf/llava-v1.6-mistral-7b-hf."""
TALK = [("Hello there, how are you?", "I am fine.\n\n1. Très bien!"), ("  What's   this: naïve 日本 🙂?", "A tea-pot")]


@pytest.fixture(scope="module")
def pieces():
    oracle("sentencepiece")
    return Path(oracle("mistral_common").__file__).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def tokenizer(pieces, tmp_path_factory):
    """What transformers makes of the real vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(pieces, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "pad_token": "<pad>", "padding_side": "left"}
    settings["legacy"] = True  # every piece between special tokens opens with a blank, as in the original LLaVA
    token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"] = {str(i): {"content": text, **token} for i, text in ADDED.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made = AutoTokenizer.from_pretrained(folder)
    assert len(made) == 32_002
    return made


@pytest.fixture(scope="module")
def llava(tokenizer):
    processor = tiny_processor()
    processor.tokenizer, processor.chat_template, processor.image_token_id = tokenizer, LLAVA_TEMPLATE, IMAGE
    return LlavaNextModel(tiny_llava().model, processor)


@pytest.fixture(scope="module")
def text(tokenizer):
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return TextModel(tiny_llava().model, TextProcessor(tokenizer))


def official(*turns):
    """Ids that Mistral's library gives to finished turns and, at the end, a question."""
    oracle("mistral_common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    *finished, (question, _) = turns
    messages = [m for asked, said in finished for m in (UserMessage(content=asked), AssistantMessage(content=said))]
    request = ChatCompletionRequest(messages=[*messages, UserMessage(content=question)])
    return MistralTokenizer.v1().encode_chat_completion(request).tokens


def messages(*turns):
    return [message for asked, said in turns for message in chat(asked, completion=said)]


@pytest.mark.parametrize("talk", [[(TALK[0][0], None)], [(TALK[1][0], None)], [TALK[0], (TALK[1][0], None)]])
def test_a_prompt_has_the_ids_of_mistrals_library(llava, talk):
    assert llava.encode_chats([messages(*talk)], [[]]).input_ids[0].tolist() == official(*talk)


def test_an_answer_has_the_ids_that_the_library_gives_it_in_a_longer_talk(llava):
    ids = llava.encode_chats([messages(*TALK)], [[]]).input_ids[0].tolist()
    longer = official(*TALK, ("more", None))
    assert ids == longer[: len(ids)] and ids[-1] == EOS and longer[len(ids)] == official(("more", None))[1]


def test_pictures_stand_behind_the_opening_and_only_the_answer_is_a_completion(llava, pieces):
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    asked, said = TALK[0]
    inputs = llava.encode([asked], [picture()], completions=[said])
    ids, roles = inputs.input_ids[0].tolist(), inputs.roles[0]
    count = ids.count(IMAGE)
    prompt = [BOS, *vocabulary.encode("[INST] "), *[IMAGE] * count, *vocabulary.encode(f"\n{asked} [/INST]")]
    assert count > 1 and ids == [*prompt, *vocabulary.encode(said), EOS]
    assert (roles == TokenRole.IMAGE).nonzero().flatten().tolist() == [i for i, t in enumerate(ids) if t == IMAGE]
    spoken = (roles == TokenRole.COMPLETION).nonzero().flatten().tolist()
    assert spoken == list(range(len(prompt), len(ids)))


def test_the_text_family_writes_the_same_prompt(text):
    for asked, _ in TALK:
        assert text.encode([asked], [None]).input_ids[0].tolist() == official((asked, None))
