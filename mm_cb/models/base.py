"""What every model family shares: chats to tokens, forward, generation, the adapter's switch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from PIL.Image import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.records import JsonObject
from mm_cb.models.chat import (
    ANSWER,
    Dialect,
    Message,
    RenderedChat,
    TokenRole,
    chat,
    count_images,
    end_written,
    render_chat,
)
from mm_cb.models.decoding import decode_ids, end_tokens, positions_of, texts_of
from mm_cb.models.dial import Scale, WeightDifference, lora_layers, lora_turned, read_scale
from mm_cb.models.inputs import Arguments, ModelInputs, Pictures, pad_rows
from mm_cb.models.probe import Probe
from mm_cb.models.switch import adapter_off
from mm_cb.models.tower import LanguageTower, TowerInputs


class ChatModel(LanguageTower):
    """A causal language model with what encodes its inputs, and with a PEFT adapter if it has one.

    Attributes:
        model: The transformers model, or the ``PeftModel`` around it. In evaluation mode, no parameter trainable.
        processor: Its processor: tokenizer, chat template, and the image processor if it sees pictures.
        name: What it was loaded from.
        max_length: Rows are cut to so many tokens, image tokens not counted; None = never.
        guest: What the package brings along with this model, if it lies inside the package.
        probe: What withholds answers that it generates; None = nothing does.
        difference: Its weights beside its base's, where it is a breaker without adapter and the base was given.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` of the configurations that the family's class is for; with ``+`` and that of the image tower
    where it is for models with this tower alone."""
    text_types: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` of the language towers (``text_config``) that the laws were run on; others are refused."""
    text_fields: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields of ``text_config`` that change how rows go through the blocks, with the values that the laws were run on;
    others are refused."""
    loads: ClassVar[Any] = AutoModelForCausalLM
    """The transformers class that reads the whole model, head included."""
    full_precision: ClassVar[tuple[str, ...]] = ("lm_head",)
    """Modules that are never quantised: gradients of pixels through 4-bit weights would be another model's."""
    end_of_turn: ClassVar[str | None] = None
    """The token that ends an answer, where it is not the tokenizer's end-of-sequence token."""
    stop_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens beside these two at which generation stops."""
    thinking_switch: ClassVar[str | None] = None
    """The variable by which the chat template leaves a thinking block in front of an answer open or empty, if any."""
    thinking: bool = False
    """Whether prompts leave that block open, and targets and prefills stand in it; else it is empty, they behind it."""

    def __init__(self, model: nn.Module, processor: Any, name: str = "", *, max_length: int | None = None) -> None:
        """Wrap a loaded model, whose state is left as it is."""
        self.model: Any = model
        self.processor: Any = processor
        self.name = name
        self.max_length = max_length
        self.guest = embedded(name)
        self.difference: WeightDifference | None = None
        self.probe: Probe | None = None

    @classmethod
    def read_processor(cls, folder: str, image_backend: str) -> Any:
        """Read the processor that lies in a model's folder.

        Raises:
            OSError: If it is not there.
        """
        raise NotImplementedError

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """Refuse a processor whose files lack what the family needs, or that is not the model's.

        Raises:
            UserError: Naming the file and the field.
        """

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the grey picture of behaviours that have none: the guest's, or the family's."""
        return self.guest.canvas if self.guest is not None and self.guest.canvas is not None else self._canvas()

    def _canvas(self) -> tuple[int, int]:
        """The family's own."""
        raise self._blind()

    def _blind(self) -> UserError:
        return UserError(f"`{self.name}` is a model of text alone: it takes no picture.")

    def preprocessing(self, image_size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """Differentiable pixels in [0, 1] -> ``pixel_values`` for pictures of ``image_size`` (height, width)."""
        raise self._blind()

    def image_features(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> Any:
        """The image tower's output for the pictures of a batch; ``pooler_output`` holds what stands for each.

        Args:
            inputs: The batch.
            pixel_values: Replaces the batch's own (an attack's, with gradient); without it there is no gradient.
        """
        raise self._blind()

    def largest_picture(self) -> int:
        """Tokens of the picture that takes most; 0 for a model of text alone."""
        return 0

    @property
    def soft_token(self) -> str | None:
        """The token whose embeddings a picture's features replace; most families' templates write it themselves."""
        return self.processor.image_token

    @property
    def dialect(self) -> Dialect:
        """What the chats are made of beside texts."""
        end = self.end_of_turn or self.processor.tokenizer.eos_token
        return Dialect(self.processor.image_token, self.soft_token, end, self.template_settings, self._thinks)

    @property
    def _thinks(self) -> bool:
        return self.thinking and self.thinking_switch is not None

    @property
    def template_settings(self) -> Mapping[str, object]:
        """What the chat template is called with beside the chat."""
        return {} if self.thinking_switch is None else {self.thinking_switch: self.thinking}

    def positions(self, inputs: ModelInputs) -> Tensor:
        """Place of every token in its row: ``(B, T)``, or ``(3, B, T)`` in a family with places in space."""
        return inputs.text_positions

    def prompt(
        self,
        text: str,
        *,
        has_image: bool,
        system: str | None = None,
        completion: str | None = None,
        close_turn: bool = True,
        tools: Sequence[JsonObject] = (),
    ) -> str:
        r"""The chat as text: ``"[INST] <image>\ntext [/INST]"``, with the completion behind it if there is one."""
        messages = chat(text, images=int(has_image), system=system, completion=completion)
        return render_chat(self.processor, messages, close_turn=close_turn, dialect=self.dialect, tools=tools).text

    def encode(
        self,
        texts: Sequence[str],
        images: Sequence[Image | None],
        *,
        completions: Sequence[str | None] | None = None,
        systems: Sequence[str | None] | None = None,
        padding_side: str = "left",
        close_turn: bool = True,
        tools: Sequence[Sequence[JsonObject]] = (),
    ) -> ModelInputs:
        """Encode one exchange per row: the user's text, with or without a picture, and perhaps a completion.

        Args:
            texts: What the user writes, without template.
            images: The picture of each row, or None.
            completions: The answer of each row, or None to end where the model goes on.
            systems: A text of the operator in front of the user's, or None.
            padding_side: ``"left"`` (to generate) or ``"right"``.
            close_turn: False leaves completions open, without the token that ends them (targets that are prefixes).
            tools: JSON schemas of functions that each row is shown; none given = no row has any.

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
        return self.encode_chats(chats, pictures, padding_side=padding_side, close_turn=close_turn, tools=tools)

    def encode_chats(
        self,
        chats: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Image]],
        *,
        padding_side: str = "left",
        close_turn: bool = True,
        tools: Sequence[Sequence[JsonObject]] = (),
        openings: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> ModelInputs:
        """Encode whole chats, each with the pictures that its parts ``{"type": "image"}`` stand for, in order.

        Each chat's ``tools``, JSON schemas, are shown by the template, and its opening stands behind the prompt as it
        is, where the model goes on; none given = no chat has any. The batch is put on ``device``; None = the model's.

        Raises:
            ValueError: If a chat has another number of image parts than of pictures, or ``max_length`` would cut off
                an image.
        """
        pictures, stands = self._pictures(images)
        rows: list[tuple[list[int], list[int]]] = []
        none = len(chats)
        for messages, row_images, row_tools, opening in zip(
            chats, images, tools or [()] * none, openings or [""] * none, strict=True
        ):
            if (named := count_images(messages)) != len(row_images):
                raise ValueError(f"A chat with {len(row_images)} pictures must have as many image parts, got {named}.")
            own, stands = stands[:named], stands[named:]
            rendered = render_chat(
                self.processor, messages, pictures=own, close_turn=close_turn, dialect=self.dialect, tools=row_tools
            )
            rows.append(self._tokenise(rendered.begun(opening) if opening else rendered))
        tokens = pad_rows(rows, self.processor.tokenizer.pad_token_id, padding_side)
        place = self.device if device is None else device
        if pictures is None:
            return ModelInputs(*tokens).to(place)
        per_row = torch.tensor([len(row) for row in images])
        made = ModelInputs(*tokens, pictures.pixel_values, per_row, pictures.beside, pictures.pixel_rows)
        return made.to(place)

    def _pictures(self, rows: Sequence[Sequence[Image]]) -> tuple[Pictures | None, list[str]]:
        """All pictures of a batch of chats as the model takes them, and the tokens that stand for each."""
        if any(rows):
            raise ValueError(f"`{self.name}` is a model of text alone, got {sum(map(len, rows))} pictures.")
        return None, []

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
            position_ids=self.positions(inputs),
            **self.picture_arguments(inputs, pixel_values),
            logits_to_keep=logits_to_keep,
            output_hidden_states=hidden_states,
            use_cache=False,
        )

    def picture_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        """Keyword arguments of the model that hold pictures; none where the batch has none."""
        return {}

    def embed(self, inputs: ModelInputs, pixel_values: Tensor | None = None, features: Any = None) -> Arguments:
        """What a pass over a batch starts from, so that two passes share one pass of the image tower.

        Args:
            inputs: The batch.
            pixel_values: Replaces the batch's own, as for `image_features`.
            features: What `image_features` gave, if it has been run.

        Returns:
            Keyword arguments for ``model``.
        """
        return self.start_from(inputs, self.tower_inputs(inputs).embeds)

    def start_from(self, inputs: ModelInputs, embeds: Tensor) -> Arguments:
        """Keyword arguments for ``model`` to run from embeddings ``(B, T, H)``."""
        told = {"attention_mask": inputs.attention_mask, "position_ids": self.positions(inputs)}
        return {"inputs_embeds": embeds, **told}

    @torch.no_grad()
    def tower_inputs(self, inputs: ModelInputs) -> TowerInputs:
        """What the language tower starts from, with all pictures in it."""
        return TowerInputs(self.base.get_input_embeddings()(inputs.input_ids))

    @torch.no_grad()
    def overlong(self, inputs: ModelInputs) -> tuple[int, str] | None:
        """The first row that has more tokens than the model has positions, with words for it; None if all fit."""
        limit = positions_of(self.model)
        for row, tokens in enumerate(inputs.attention_mask.sum(dim=1).tolist() if limit else ()):
            if tokens > limit:
                told = f"too long for `{self.name}`: its chat has {tokens} tokens, the model has {limit} positions."
                return row, told
        return None

    def generate(self, inputs: ModelInputs, max_new_tokens: int, temperature: float | None = None) -> list[str]:
        """Completions of left-padded prompts, special tokens stripped but for the marks around a thought.

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
        given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        given |= self.picture_arguments(inputs)
        tokenizer = self.processor.tokenizer
        said = decode_ids(self.model, tokenizer, given, max_new_tokens, self.stops(), temperature)
        texts = texts_of(tokenizer, said, max_new_tokens)
        if self.probe is None:
            return texts
        withheld = self.probe.withheld(self, inputs, said)
        return [self.probe.refusal if hit else text for hit, text in zip(withheld, texts, strict=True)]

    def stops(self) -> list[int]:
        """Ids of the tokens at which generation stops: the family's, the tokenizer's, the model's, the template's."""
        tokenizer = self.processor.tokenizer
        ends = {self.dialect.end_of_turn, *self.stop_tokens} - {None}
        ids = {tokenizer.convert_tokens_to_ids(end) for end in ends}
        if tokenizer.unk_token not in ends:  # in some tokenizers it is, and ends texts
            ids -= {tokenizer.unk_token_id}
        answered = self.prompt("a", has_image=False, completion=ANSWER)
        return end_tokens(self.model, tokenizer, {*ids, end_written(tokenizer, answered)})

    @contextmanager
    def adapter_scaled(self, scale: Scale) -> Iterator[None]:
        """Run between the base (0) and the breaker (1): weights W0 + scale * (W1 - W0). Restored at the end.

        1 leaves everything as it is, to the last bit; without an adapter or a base nothing is there to scale.

        Args:
            scale: One number, or one for every row of the batches inside, shape ``(B,)``.

        Raises:
            UserError: If it is not from 0 to 1.
        """
        scale = read_scale(scale)
        with lora_turned(self.model, scale) if self.difference is None else self.difference.turned(scale):
            yield

    def changed_modules(self) -> list[nn.Module]:
        """The modules in which the breaker differs from its base; none without an adapter or a base."""
        return lora_layers(self.model) if self.difference is None else self.difference.modules

    @contextmanager
    def adapter(self, enabled: bool) -> Iterator[None]:
        """Run with the adapter on or off; without an adapter both are the base model. Restored at the end.

        Off is the given base, where the breaker is a whole checkpoint.
        """
        if self.difference is not None and not enabled:
            with self.difference.turned(0.0):
                yield
            return
        if enabled or not isinstance(self.model, PeftModel):
            yield
            return
        with adapter_off(self.model):
            yield
