"""A language model in this process that continues complete prompts: for classifiers and local text judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256
from mm_cb.core.records import Message
from mm_cb.inference.cached_chunks import chunks
from mm_cb.models.chat import refuse_unwritable
from mm_cb.models.decoding import decode, end_tokens


def version_of(name: str) -> dict[str, object]:
    """What tells this version of a checkpoint from another: a folder's weight hashes, or a hub id's loaded commit.

    The commit is None where the hub's cache does not know the id (nothing of it was loaded).
    """
    folder = Path(name)
    if folder.is_dir():
        return {"weights_sha256": {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}}
    found = hub.cached(name, "*config.json")
    return {"revision": found[0].parent.name if found else None}  # .../snapshots/<commit>/<file>


class LanguageModel:
    """A causal language model, its tokenizer padding on the left; safetensors only, no remote code.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int = 8) -> None:
        """Wrap a loaded model."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self._batch = batch
        self._ends = end_tokens(model, tokenizer)

    @classmethod
    def load(
        cls, name: str, *, adapter: str | None = None, device: str = "cpu", dtype: str = "bfloat16", batch: int = 8
    ) -> LanguageModel:
        """Load a model and perhaps a PEFT adapter, whose own tokenizer is then used.

        Raises:
            UserError: If the model or the adapter is not there.
        """
        from transformers import AutoModelForCausalLM

        from mm_cb.models.adapters import put_adapter
        from mm_cb.models.cache import model_folder
        from mm_cb.models.families import load_tokenizer, read_config
        from mm_cb.models.loading import load_whole

        loaded = load_whole(AutoModelForCausalLM, name, read_config(name), dtype=dtype)
        added = None if adapter is None else model_folder(adapter, weights=True)
        tokenizer = load_tokenizer(added or name)
        if added is not None:
            loaded = put_adapter(loaded, added, name)
        return cls(loaded.to(device).requires_grad_(False), tokenizer, batch)

    def cut(self, text: str, tokens: int, *, side: str = "right", specials: bool = False) -> str:
        """A text as classifiers' own code cuts it: encoded, at most ``tokens`` tokens kept, decoded.

        Args:
            text: What is cut; a short enough one stays as it is.
            tokens: How many stay, the special ones that encoding adds among them.
            side: Where tokens are taken away, ``left`` or ``right``.
            specials: Whether the special tokens stay in the text, in a short one too.
        """
        refuse_unwritable(text)
        self.tokenizer.truncation_side = side
        if not specials and len(self.tokenizer(text)["input_ids"]) <= tokens:
            return text
        ids = self.tokenizer(text, truncation=True, max_length=tokens)["input_ids"]
        return str(self.tokenizer.decode(ids, skip_special_tokens=not specials))

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """Messages through the model's own chat template, ending where it answers.

        Raises:
            UserError: If the model has none, or it cannot write these.
        """
        from jinja2 import TemplateError

        from mm_cb.models.templates import check_text_template, refuse_rewritten

        check_text_template(self.tokenizer, Path(self.tokenizer.name_or_path))
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ArithmeticError) as e:
            raise UserError(f"the judge's chat template cannot write its prompt: {e}") from e
        refuse_rewritten(messages, str(text))
        return str(text)

    @torch.no_grad()
    def continuations(self, prompts: Mapping[str, str], max_new_tokens: int) -> Iterator[tuple[str, str]]:
        """Greedy continuations, key by key, longest prompts first."""
        for keys, inputs in self._batches(prompts):
            texts = decode(self.model, self.tokenizer, inputs, max_new_tokens, self._ends)
            yield from zip(keys, texts, strict=True)

    @torch.no_grad()
    def next_probabilities(self, prompts: Mapping[str, str], tokens: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """Probabilities of some tokens among themselves as the next one, float32 ``(len(tokens),)``, key by key."""
        for keys, inputs in self._batches(prompts):
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = self.model(**inputs, position_ids=positions, use_cache=False).logits[:, -1, list(tokens)]
            yield from zip(keys, logits.float().softmax(-1).cpu(), strict=True)

    def _batches(self, prompts: Mapping[str, str]) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        for keys in chunks(sorted(prompts, key=lambda key: -len(prompts[key])), self._batch):
            texts = [prompts[key] for key in keys]
            for text in texts:
                refuse_unwritable(text)
            bos = self.tokenizer.bos_token
            special = not (bos and texts[0].startswith(bos))  # a rendered chat template brings its own
            encoded = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special)
            yield keys, {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
