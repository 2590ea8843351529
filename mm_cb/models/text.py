"""Causal language models without eyes: Mistral, Llama, GPT-2 and whatever else transformers lays out as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mm_cb.models.base import ChatModel
from mm_cb.models.chat import Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Our own, for models that were never taught a chat format and so bring no template (GPT-2)."""


class TextProcessor:
    """A tokenizer in the shape of a processor: it takes messages of typed parts, and knows no image token.

    Attributes:
        tokenizer: The tokenizer, with a padding token (its end-of-sequence token if it has none of its own).
        image_token: None: no text can be mistaken for a picture.
    """

    image_token = None

    def __init__(self, tokenizer: Any) -> None:
        """Take over a tokenizer that nobody else uses."""
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """The tokenizer's template on plain texts, which is what templates of text models expect.

        Raises:
            ValueError: If a message holds a picture.
        """
        return self.tokenizer.apply_chat_template([_flat(message) for message in messages], **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class TextModel(ChatModel):
    """A causal language model with its tokenizer; everything else it does is `ChatModel`'s."""

    @classmethod
    def read_processor(cls, folder: str, image_backend: str) -> TextProcessor:
        """The tokenizer as a processor."""
        return TextProcessor(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _flat(message: Message) -> Message:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(part["type"] != "text" for part in parts):
        raise ValueError("A model of text alone takes no pictures, got a message with an image part.")
    return {**message, "content": "\n".join(part["text"] for part in parts)}
