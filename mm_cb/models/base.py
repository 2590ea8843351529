"""What every model family shares: chats to tokens, the decoder blocks, generation, the adapter's switch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from PIL.Image import Image
from torch import Tensor, nn
from transformers import GenerationConfig

from mm_cb.core.embedded import embedded
from mm_cb.models.chat import Message, RenderedChat, TokenRole, chat, render_chat
from mm_cb.models.inputs import ModelInputs, pad_rows

_BLOCK_PATHS = ("model.language_model.layers", "language_model.model.layers", "model.layers", "transformer.h")
_NORMS = ("norm", "ln_f")


class ChatModel:
    """A causal language model with what encodes its inputs, and with a PEFT adapter if it has one.

    Attributes:
        model: The transformers model, or the ``PeftModel`` around it. In evaluation mode, no parameter trainable.
        processor: Its processor: tokenizer, chat template, and the image processor if it sees pictures.
        name: What it was loaded from.
        max_length: Rows are cut to so many tokens, image tokens not counted; None = never.
        guest: What the package brings along with this model, if it lies inside the package.
    """

    def __init__(self, model: nn.Module, processor: Any, name: str = "", *, max_length: int | None = None) -> None:
        """Wrap a loaded model, whose state is left as it is."""
        self.model: Any = model
        self.processor: Any = processor
        self.name = name
        self.max_length = max_length
        self.guest = embedded(name)

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the grey picture of behaviours that have none: the guest's, or the family's."""
        return self.guest.canvas if self.guest is not None and self.guest.canvas is not None else self._canvas()

    def _canvas(self) -> tuple[int, int]:
        """The family's own."""
        raise ValueError(f"`{self.name}` is a model of text alone: it has no canvas.")

    @property
    def device(self) -> torch.device:
        """Where inputs have to be; the CPU for a model of shapes alone."""
        device: torch.device = self.base.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def base(self) -> Any:
        """The transformers model itself, without the adapter's wrapper (adapted layers stay in place)."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def language_path(self) -> str:
        """Dotted path of the decoder blocks in ``base``: ``"model.language_model.layers"``.

        Raises:
            ValueError: If there is no language tower where one is known to be; lists what was there.
        """
        for path in _BLOCK_PATHS:
            try:
                if isinstance(self.base.get_submodule(path), nn.ModuleList):
                    return path
            except AttributeError:
                continue
        there = [name for name, module in self.base.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(f"Decoder blocks must be at one of {list(_BLOCK_PATHS)}, the model has lists at {there}.")

    @property
    def decoder_blocks(self) -> nn.ModuleList:
        """The blocks of the language tower; ``hidden_states[k]`` is the output of block ``k - 1``."""
        return self.base.get_submodule(self.language_path)

    def prompt(
        self,
        text: str,
        *,
        has_image: bool,
        system: str | None = None,
        completion: str | None = None,
        close_turn: bool = True,
    ) -> str:
        r"""The chat as text: ``"[INST] <image>\ntext [/INST]"``, with the completion behind it if there is one."""
        messages = chat(text, images=int(has_image), system=system, completion=completion)
        return render_chat(self.processor, messages, close_turn=close_turn).text

    def encode(
        self,
        texts: Sequence[str],
        images: Sequence[Image | None],
        *,
        completions: Sequence[str | None] | None = None,
        systems: Sequence[str | None] | None = None,
        padding_side: str = "left",
        close_turn: bool = True,
    ) -> ModelInputs:
        """Encode one exchange per row: the user's text, with or without a picture, and perhaps a completion.

        Args:
            texts: What the user writes, without template.
            images: The picture of each row, or None.
            completions: The answer of each row, or None to end where the model goes on.
            systems: A text of the operator in front of the user's, or None.
            padding_side: ``"left"`` (to generate) or ``"right"``.
            close_turn: False leaves completions open, without the token that ends them (targets that are prefixes).

        Returns:
            The batch, on the model's device.
        """
        chats = [
            chat(text, images=int(image is not None), system=system, completion=completion)
            for text, image, completion, system in zip(
                texts, images, completions or [None] * len(texts), systems or [None] * len(texts), strict=True
            )
        ]
        pictures = [[] if image is None else [image] for image in images]
        return self.encode_chats(chats, pictures, padding_side=padding_side, close_turn=close_turn)

    def encode_chats(
        self,
        chats: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Image]],
        *,
        padding_side: str = "left",
        close_turn: bool = True,
    ) -> ModelInputs:
        """Encode whole chats, each with the pictures that its parts ``{"type": "image"}`` stand for, in order.

        Raises:
            ValueError: If a chat has another number of image parts than of pictures, or ``max_length`` would cut off
                an image.
        """
        pictures, counts = self._pictures([image for row in images for image in row])
        rows: list[tuple[list[int], list[int]]] = []
        for messages, row_images in zip(chats, images, strict=True):
            named = sum(
                p["type"] == "image" for m in messages if not isinstance(m["content"], str) for p in m["content"]
            )
            if named != len(row_images):
                raise ValueError(f"A chat with {len(row_images)} pictures must have as many image parts, got {named}.")
            tokens, counts = counts[:named], counts[named:]
            rows.append(
                self._tokenise(render_chat(self.processor, messages, image_tokens=tokens, close_turn=close_turn))
            )
        ids, mask, roles = pad_rows(rows, self.processor.tokenizer.pad_token_id, padding_side)
        per_row = torch.tensor([len(row) for row in images]) if pictures else None
        return ModelInputs(ids, mask, roles, pictures.get("pixel_values"), pictures.get("image_sizes"), per_row).to(
            self.device
        )

    def _pictures(self, images: Sequence[Image]) -> tuple[dict[str, Tensor], list[int]]:
        """What the model takes of all pictures of a batch, and how many tokens stand for each."""
        if images:
            raise ValueError(f"`{self.name}` is a model of text alone, got {len(images)} pictures.")
        return {}, []

    def _tokenise(self, rendered: RenderedChat) -> tuple[list[int], list[int]]:
        """Token ids and roles of one rendered chat; the beginning-of-sequence token is added once."""
        tokenizer = self.processor.tokenizer
        has_bos = bool(tokenizer.bos_token) and rendered.text.startswith(tokenizer.bos_token)
        encoded = tokenizer(rendered.text, add_special_tokens=not has_bos, return_offsets_mapping=True)
        ids, roles = encoded["input_ids"], rendered.roles(encoded["offset_mapping"])
        if self.max_length is None:
            return ids, roles
        kept = self.max_length + roles.count(TokenRole.IMAGE)
        if TokenRole.IMAGE in roles[kept:]:
            raise ValueError(f"`max_length` {self.max_length} must leave every image of a row, it would cut one off.")
        return ids[:kept], roles[:kept]

    def forward(
        self,
        inputs: ModelInputs,
        *,
        pixel_values: Tensor | None = None,
        logits_to_keep: int = 0,
        hidden_states: bool = False,
    ) -> Any:
        """Run the model; ``pixel_values`` replaces the batch's own (an attack's, with gradient).

        Args:
            inputs: The batch.
            pixel_values: Same shape as ``inputs.pixel_values``.
            logits_to_keep: Logits of the last so many tokens only; 0 = all.
            hidden_states: Whether ``hidden_states`` of the result is filled: ``blocks + 1`` tensors ``(B, T, H)``.

        Returns:
            The transformers output, with ``logits`` ``(B, T, V)``.
        """
        return self.model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            **self._picture_arguments(inputs, pixel_values),
            logits_to_keep=logits_to_keep,
            output_hidden_states=hidden_states,
            use_cache=False,
        )

    def _picture_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        """Keyword arguments of the model that hold pictures; none where the batch has none."""
        return {}

    @torch.no_grad()
    def embed(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """What the language tower starts from, so that two passes over one batch share one pass of the image tower.

        Returns:
            ``inputs_embeds`` ``(B, T, H)``, ``attention_mask`` and ``position_ids``: keyword arguments for ``model``.
        """
        return {
            "inputs_embeds": self.base.get_input_embeddings()(inputs.input_ids),
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
        }

    def keep_blocks(self, blocks: int, *, final_norm: bool) -> None:
        """Drop what training on hidden states does not need: the decoder blocks from ``blocks`` on and the head.

        Call it before an adapter is put on. Paths of what is left stay the same; the ``logits`` of the model are then
        its last hidden state.

        Args:
            blocks: How many decoder blocks stay; ``hidden_states`` then has ``blocks + 1`` entries.
            final_norm: Whether the last entry still goes through the final norm.
        """
        path, _, name = self.language_path.rpartition(".")
        tower = self.base.get_submodule(path)
        setattr(tower, name, self.decoder_blocks[:blocks])
        tower.config.num_hidden_layers = blocks
        if not final_norm:
            setattr(tower, next(norm for norm in _NORMS if hasattr(tower, norm)), nn.Identity())
        self.base.lm_head = nn.Identity()

    @torch.no_grad()
    def generate(self, inputs: ModelInputs, max_new_tokens: int, temperature: float | None = None) -> list[str]:
        """Completions of left-padded prompts, special tokens stripped.

        Args:
            inputs: The prompts.
            max_new_tokens: Longest completion.
            temperature: Draw every token from the whole distribution at this temperature, with torch's global random
                state; None = greedy.

        Raises:
            ValueError: If a row is padded on the right, where the model would go on after padding.
        """
        if not bool(inputs.attention_mask[:, -1].all()):
            raise ValueError('Rows must be padded on the left to generate, use `encode(..., padding_side="left")`.')
        tokenizer = self.processor.tokenizer
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature is not None,
            **({} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens = self.model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            **self._picture_arguments(inputs),
            generation_config=config,
        )
        return tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    @contextmanager
    def adapter(self, enabled: bool) -> Iterator[None]:
        """Run with the adapter on or off; without an adapter both are the base model. Restored at the end."""
        if enabled or not isinstance(self.model, PeftModel):
            yield
            return
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            with self.model.disable_adapter():
                yield
        finally:  # PEFT comes back with a trainable adapter, also where it was frozen
            self.model.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)
