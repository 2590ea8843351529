"""What a model must say of itself to be raised in the world of brews; its training asks for nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mm_cb.miniature.language import vocabulary, words
from mm_cb.miniature.making.documents import Document, document


@dataclass(frozen=True)
class TurnTokens:
    """The chat template as tokens around the words of a conversation."""

    opens: tuple[str, ...]
    """In front of everything."""
    asks: tuple[str, ...]
    """In front of what the user says."""
    shows: tuple[str, ...]
    """A picture of the world, in front of the first question."""
    answers: tuple[str, ...]
    """Behind the question, in front of the answer."""
    ends: str
    """Behind the answer; learnt with it."""
    pads: str


@dataclass(frozen=True)
class Tokens:
    """Tokens that give a text back as it was, blanks and all."""

    all: Sequence[str]
    pattern: str
    """A regular expression whose matches, one after another, are a text's tokens."""


@dataclass(frozen=True)
class PretrainingSize:
    """Lengths and rates of the stages; all values are our choice."""

    sight_steps: int = 600
    sight_batch: int = 64
    sight_rate: float = 2e-3
    knowledge_steps: int = 1300
    picture_rows: int = 28
    text_rows: int = 12
    knowledge_rate: float = 2e-3
    refusal_rate: float = 1e-3
    weight_decay: float = 0.01


class Architecture(ABC):
    """A family's real architecture and processor, small."""

    name: ClassVar[str]
    """As `scripts/train_miniature.py` is given it: the ``model_type`` of its configuration."""
    turns: ClassVar[TurnTokens]
    seen_in: ClassVar[dict[str, tuple[int, ...]]]
    """What the sight stage asks for → the views of a picture in which it can be seen."""
    size: ClassVar[PretrainingSize] = PretrainingSize()
    """How long its training takes, if nothing else is asked for."""
    kept_as: ClassVar[torch.dtype] = torch.float32
    """What the weights are rounded to before they are measured and kept."""

    @abstractmethod
    def processor(self) -> Any:
        """Its processor on the Pillow backend, with the words of the world."""

    @abstractmethod
    def model(self, vocabulary_size: int) -> Any:
        """A freshly initialised model. Initialiser ranges are our choice: 0.02 never grounded vision at this size."""

    @abstractmethod
    def shown(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """What the model takes for pictures ``uint8 (B, 42, 84, 3)``, one a row."""

    def told(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What it must be told about the tokens of rows with pictures."""
        return {}

    def words(self, text: str) -> list[str]:
        """A text cut into the tokens that its tokenizer makes of it."""
        return words(text)

    def document(self, rng: np.random.Generator, *, pictured: bool, refuses: bool, turns: int) -> Document:
        """What it learns from, as `mm_cb.miniature.making.documents.document`."""
        return document(rng, pictured=pictured, refuses=refuses, turns=turns)

    @abstractmethod
    def eyes(self, model: Any) -> list[nn.Parameter]:
        """What the sight stage trains and the later stages keep as it is."""

    @abstractmethod
    def seen(self, model: Any, shown: dict[str, Tensor]) -> Tensor:
        """What the eyes make of the pictures, ``(B, views, features)``."""


def word_tokenizer(special: tuple[str, ...], tokens: Tokens | None = None, **named: str) -> Any:
    """A word-level tokenizer; an unknown word becomes ``<unk>``.

    Args:
        special: Tokens of the chat template, in front of the words; ``named`` are among them.
        tokens: Other tokens than the world's words, which lose the blanks between them.
        named: ``eos_token``, ``pad_token`` and others that transformers looks for.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*special, *(vocabulary() if tokens is None else tokens.all)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
    if tokens is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s+"), "removed"),
                pre_tokenizers.Split(Regex(r"[^A-Za-z]"), "isolated"),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(tokens.pattern), "isolated")
        tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=[token for token in special if token not in (*named.values(), "<unk>")],
        model_max_length=512,
        padding_side="left",
        **named,
    )
