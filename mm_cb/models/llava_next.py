"""LLaVA-NeXT: a language model that sees pictures, cut into tiles of its image tower's size."""

from collections.abc import Callable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.models.base import ChatModel
from mm_cb.models.chat import TokenRole
from mm_cb.models.inputs import ModelInputs


class LlavaNextModel(ChatModel):
    """A ``LlavaNextForConditionalGeneration`` with its ``LlavaNextProcessor``."""

    def _canvas(self) -> tuple[int, int]:
        """Two tiles square: 672 x 672."""
        tile = self.processor.image_processor.crop_size["height"]
        return 2 * tile, 2 * tile

    def _pictures(self, images: Sequence[Image]) -> tuple[dict[str, Tensor], list[int]]:
        """``pixel_values`` ``(N, tiles, 3, h, w)`` and ``image_sizes`` ``(N, 2)``, and each picture's token count."""
        from image_attacks import on_white

        flat = [on_white(image) for image in images]
        pictures = self.processor.image_processor(flat, return_tensors="pt") if flat else {}
        counts = [len(self.processor.replace_image_token(pictures, i)) for i in range(len(flat))]
        return pictures, [count // len(self.processor.image_token) for count in counts]

    def _picture_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        """The pictures in the model's dtype; `generate` runs the image tower for every key it is given, None too."""
        pixels = inputs.pixel_values if pixel_values is None else pixel_values
        if pixels is None or inputs.image_sizes is None:
            return {}
        return {"pixel_values": pixels.to(self.base.dtype), "image_sizes": inputs.image_sizes}

    def embed(self, inputs: ModelInputs, pixel_values: Tensor | None = None) -> dict[str, Tensor]:
        """As `ChatModel.embed`, with the image tower's features where the image tokens are.

        Args:
            inputs: The batch.
            pixel_values: Replaces the batch's own (an attack's, with gradient); without it there is no gradient.
        """
        embedded = super().embed(inputs)
        pictures = self._picture_arguments(inputs, pixel_values)
        if pictures:
            with torch.set_grad_enabled(pixel_values is not None and torch.is_grad_enabled()):
                features = self.base.get_image_features(**pictures, return_dict=True).pooler_output
                embeds, place = embedded["inputs_embeds"], (inputs.roles == TokenRole.IMAGE).unsqueeze(-1)
                embedded["inputs_embeds"] = embeds.masked_scatter(place, torch.cat(features).to(embeds.dtype))
        return embedded

    def preprocessing(self, image_size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """Differentiable pixels in [0, 1] -> ``pixel_values`` for pictures of ``image_size`` (height, width)."""
        from image_attacks import LlavaNextPreprocessing

        return LlavaNextPreprocessing(self.processor.image_processor, image_size=image_size)
