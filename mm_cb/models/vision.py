"""Models that see: pictures become tokens whose embeddings the image tower's features replace.

A family says what is special about it by overriding a few members of `VisionModel`; the defaults fit models of an image
tower, a projector and a language tower whose processor writes one token, repeated, for a picture.
docs/add_a_model.md has the list and an example.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from image_attacks import ExactPreprocessing, Plan, as_rgb
from mm_cb.core.errors import UserError
from mm_cb.models.base import ChatModel
from mm_cb.models.inputs import Arguments, ModelInputs, Pictures, Shown, side_by_side
from mm_cb.models.laws import check_pictures
from mm_cb.models.picture_cache import PictureCache
from mm_cb.models.tower import TowerInputs


class VisionModel(ChatModel):
    """A vision-language model with its processor."""

    loads: ClassVar[Any] = AutoModelForImageTextToText
    full_precision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector", "lm_head")
    beside: ClassVar[tuple[str, ...]] = ()
    """What the model takes of the image processor's output beside the pixels; one entry a picture."""
    nested: ClassVar[bool] = False
    """Whether the image processor wants a list of pictures for each sample."""
    picture_cache: PictureCache | None = None
    """Where prepared pictures are kept; None = nowhere."""

    @classmethod
    def read_processor(cls, folder: str, image_backend: str) -> Any:
        """As `ChatModel.read_processor`, with the image processor of one backend where it is available.

        It is read apart, because a video processor beside it would be asked for the same backend and has no choice.
        """
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        if not hasattr(processor, "tokenizer"):  # transformers settles for what it finds
            raise ValueError(f"its files make no processor of pictures and texts, but a {type(processor).__name__}")
        images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend=image_backend)
        processor.image_processor = images
        return processor

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `ChatModel.check_processor`: pictures are resized, scaled and normalised."""
        check_pictures(processor, folder)

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """What the image processor does with pictures of one size (height, width), for attacks through it.

        Raises:
            ValueError: If it is set up in a way that the family's class does not follow.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not say what its image processor does.")

    @property
    def options(self) -> Mapping[str, object]:
        """Settings that the processor calls its image processor with; without them that would do something else."""
        return {}

    def pixels(self, made: Mapping[str, Any]) -> Tensor:
        """``pixel_values`` of all pictures in the image processor's output, along the first axis."""
        return made["pixel_values"]

    def pixel_rows(self, made: Mapping[str, Any]) -> Tensor | None:
        """Rows of ``pixels`` of every picture; None = one each."""
        return None

    def token_arguments(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """What the model must be told about the tokens of a batch with pictures."""
        return {}

    def keep_pictures(self, folder: Path | str) -> None:
        """Keep prepared pictures in a folder, and take those from there that it holds, see `PictureCache`.

        Raises:
            UserError: As `refuse_own_code`.
        """
        self.refuse_own_code()
        self.picture_cache = PictureCache(Path(folder))

    def refuse_own_code(self) -> None:
        """Refuse to keep prepared pictures of somebody's own family or processor: no file's name tells of an edit.

        Raises:
            UserError: If it is one.
        """
        images = getattr(self.processor, "image_processor", None)
        for one, home in ((self, "mm_cb"), (self.processor, "transformers"), (images, "transformers")):
            if one is not None and type(one).__module__.partition(".")[0] != home:
                raise UserError(
                    f"prepared pictures are kept for families of mm-cb and processors of transformers, not for "
                    f"`{type(one).__name__}`, whose code may change: leave out `picture_cache`."
                )

    def grouped(self, rows: Sequence[Sequence[Image]]) -> list[Any]:
        """The pictures of a batch of chats, which all have some, as the image processor wants them."""
        flat = [image for row in rows for image in row]
        return [[image] for image in flat] if self.nested else flat

    def _pictures(self, rows: Sequence[Sequence[Image]]) -> tuple[Pictures | None, list[str]]:
        """All pictures of a batch of chats as the model takes them, and the tokens that stand for each."""
        rows = [[as_rgb(image) for image in row] for row in rows if row]
        if not rows:
            return None, []
        if (cache := self.picture_cache) is None:
            return self._shown(rows)
        self.refuse_own_code()
        return side_by_side([cache.shown(self, row, partial(self._shown, [row])) for row in rows])

    def _shown(self, rows: Sequence[Sequence[Image]]) -> Shown:
        """The pictures of chats as the image processor makes them."""
        flat = [image for row in rows for image in row]
        try:
            made = self.processor.image_processor(self.grouped(rows), return_tensors="pt", **self.options)
            stands = [self.processor.replace_image_token(made, index) for index in range(len(flat))]
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in flat[:3])
            raise UserError(
                f"the image processor of `{self.name}` cannot show pictures of {sizes} ({type(error).__name__}: "
                f"{error}); "
                "give it pictures of another shape, or look at its preprocessor_config.json or processor_config.json."
            ) from error
        if not bool(made["pixel_values"].isfinite().all()):
            raise UserError(
                f"the image processor of `{self.name}` must give finite values, got NaN or infinity; look at "
                "`image_std`, `image_mean` and `rescale_factor` of its configuration."
            )
        beside = {name: made[name] for name in self.beside}
        return Shown(Pictures(self.pixels(made), beside, self.pixel_rows(made)), stands)

    def picture_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        """The pictures in the model's dtype; `generate` runs the image tower for every key it is given, None too."""
        if inputs.pixel_values is None:
            return {}
        return {**self._tower_arguments(inputs, pixel_values), **self.token_arguments(inputs)}

    def _tower_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None) -> dict[str, Tensor]:
        """What the image tower takes."""
        pixels = inputs.pixel_values if pixel_values is None else pixel_values
        assert pixels is not None
        return {"pixel_values": pixels.to(self.base.dtype), **inputs.beside}

    def image_features(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> Any:
        """As `ChatModel.image_features`."""
        with torch.set_grad_enabled(pixel_values is not None and torch.is_grad_enabled()):
            return self.base.get_image_features(**self._tower_arguments(inputs, pixel_values), return_dict=True)

    def embed(self, inputs: ModelInputs, pixel_values: Tensor | None = None, features: Any = None) -> Arguments:
        """As `ChatModel.embed`: the tokens, and the image tower's output in place of pixels."""
        told: Arguments = {}
        if inputs.pixel_values is not None:
            seen = self.matched(inputs, self.image_features(inputs, pixel_values) if features is None else features)
            told = {**inputs.beside, **self.token_arguments(inputs), "mm_encoder_outputs": {"image": seen}}
        own = {"attention_mask": inputs.attention_mask, "position_ids": self.positions(inputs)}
        return {"input_ids": inputs.input_ids, **own, **told}

    @torch.no_grad()
    def tower_inputs(self, inputs: ModelInputs) -> TowerInputs:
        """What the language tower starts from, with all pictures in it."""
        if inputs.pixel_values is None:
            return super().tower_inputs(inputs)
        return self.with_features(inputs, self.matched(inputs, self.image_features(inputs)))

    def matched(self, inputs: ModelInputs, features: Any) -> Any:
        """An image tower's output for a batch, each of whose rows has a token for every feature of its pictures.

        Raises:
            UserError: If one has not: features would go to the tokens of other pictures.
        """
        assert inputs.images_per_row is not None
        lengths: list[float] = [one.numel() / one.shape[-1] for one in features.pooler_output]
        counts = inputs.images_per_row.tolist()
        if len(lengths) != sum(counts) and inputs.pixel_rows is not None:  # one entry for each tile, or for all
            tiles = inputs.pixel_rows.tolist()
            lengths = [sum(lengths) * own / sum(tiles) for own in tiles]
        pictures = iter(lengths)
        made = [sum(islice(pictures, count)) for count in counts]
        for row, (tokens, own) in enumerate(zip(inputs.image_mask.sum(1).tolist(), made, strict=True), 1):
            if tokens != own:
                raise UserError(
                    f"row {row} of a batch has {tokens} tokens for pictures, of which `{self.name}` makes {own:g} "
                    "features; its processor and its chat template must write a token for each."
                )
        return features

    def with_features(self, inputs: ModelInputs, features: Any) -> TowerInputs:
        """The text's embeddings with a picture's features wherever one of its tokens stands."""
        with torch.no_grad():
            embeds = self.base.get_input_embeddings()(inputs.input_ids)
        return TowerInputs(put(embeds, inputs, features.pooler_output))

    def preprocessing(self, image_size: tuple[int, int]) -> ExactPreprocessing:
        """Differentiable pixels in [0, 1] -> ``pixel_values`` for pictures of ``image_size`` (height, width).

        Raises:
            UserError: If the image processor does something else with them than the family's plan.
        """
        try:
            plan = replace(self.plan(image_size), options=self.options, nested=self.nested)
            return ExactPreprocessing(self.processor.image_processor, image_size, plan)
        except ValueError as error:
            height, width = image_size
            raise UserError(
                f"`{self.name}` cannot be attacked through pictures of {width} x {height}: {error}"
            ) from error

    def unimitated(self, image_size: tuple[int, int]) -> str | None:
        """The setting of the image processor for which pictures of this size are not imitated exactly.

        Found by trying: with that setting at its class's value they would be. None if there is no such setting.
        """
        held = self.processor.image_processor
        try:
            for name, value in held.to_dict().items():
                usual = getattr(type(held), name, value)
                if usual == value:
                    continue
                self.processor.image_processor = copy(held)
                setattr(self.processor.image_processor, name, usual)
                with suppress(UserError, TypeError, LookupError, AttributeError):  # no processor that a plan follows
                    if self.preprocessing(image_size).exact_by == "emulation":
                        return name
        finally:
            self.processor.image_processor = held
        return None


def joined(pictures: Any) -> Tensor:
    """Features of all pictures behind each other, ``(tokens, H)``; a list of ``(tokens, H)``, or stacked."""
    if isinstance(pictures, Tensor):
        return pictures.reshape(-1, pictures.shape[-1])
    return torch.cat([picture.reshape(-1, picture.shape[-1]) for picture in pictures])


def put(states: Tensor, inputs: ModelInputs, pictures: Any) -> Tensor:
    """States ``(B, T, H)`` with the pictures' features in place of those where picture tokens stand."""
    return states.masked_scatter(inputs.image_mask.unsqueeze(-1), joined(pictures).to(states.dtype))


def moved(features: Any, shift: Tensor) -> Any:
    """An image tower's output with what stands for the pictures moved by ``shift`` ``(tokens, H)``."""
    pictures = features.pooler_output
    tokens = joined(pictures) + shift
    if isinstance(pictures, Tensor):
        made: Any = tokens.view_as(pictures)
    else:
        lengths = [picture.numel() // picture.shape[-1] for picture in pictures]
        made = [one.view_as(picture) for one, picture in zip(tokens.split(lengths), pictures, strict=True)]
    return type(features)(**{**features, "pooler_output": made})


def detached(value: Any) -> Any:
    """A tree of tensors (mappings, lists, tuples, transformers' outputs) without gradient."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return type(value)(**{name: detached(one) for name, one in value.items()})
    return type(value)(map(detached, value)) if isinstance(value, list | tuple) else value
