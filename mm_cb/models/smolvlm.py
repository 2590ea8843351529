"""SmolVLM and Idefics3: every picture blown up, cut into square tiles, and shown as a whole behind them."""

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.smolvlm import processing_smolvlm

from image_attacks import Plan, resize, tiles
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.laws import check_fields, check_longest, check_pictures
from mm_cb.models.vision import VisionModel


def _no_words(number: int) -> str:
    raise ImportError("Films need the package num2words.")


if processing_smolvlm.num2words is None:  # of whatever family a model is: films are read of none
    processing_smolvlm.num2words = _no_words

_MOST_TILES = 17
"""Of a picture, with the published image processors of both: 4 x 4 and the whole."""


class SmolVLMModel(VisionModel):
    """A ``SmolVLM``- or ``Idefics3ForConditionalGeneration`` with its processor.

    A batch's ``pixel_values`` are the tiles of all pictures behind each other, ``(tiles, 3, side, side)``. Published
    processors show all pictures of a chat so, but put black tiles behind chats with fewer.
    """

    model_types = ("idefics3", "smolvlm")
    text_types = ("llama",)
    full_precision = ("vision_model", "connector", "lm_head")
    nested = True
    end_of_turn = "<end_of_utterance>"

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for tiles of the image tower's size, of as many tokens as it gives."""
        vision = config.vision_config
        check_pictures(processor, folder, do_pad=True, max_image_size={"longest_edge": vision.image_size})
        check_longest(processor.image_processor, folder)
        check_fields(processor, folder, image_seq_len=_tokens_of_a_tile(config))

    @property
    def options(self) -> Mapping[str, object]:
        """Rows and columns of tiles, which the processor asks for to write a token in front of each."""
        return {"return_row_col_info": True}

    def _canvas(self) -> tuple[int, int]:
        """Two tiles square: 768 x 768 in SmolVLM-2B."""
        side = self.processor.image_processor.max_image_size["longest_edge"]
        return 2 * side, 2 * side

    def largest_picture(self) -> int:
        """Tokens of a square picture, which has most tiles; of the published processor's where there is none here."""
        most = _MOST_TILES
        if self.processor is not None:
            images = self.processor.image_processor
            most = math.ceil(images.size["longest_edge"] / images.max_image_size["longest_edge"]) ** 2 + 1
        return most * _tokens_of_a_tile(self.base.config)

    def pixels(self, made: Mapping[str, Any]) -> Tensor:
        """The tiles of all pictures, without those that only fill the processor's tensor."""
        return torch.cat([shown[:count] for shown, count in zip(made["pixel_values"], _tiles(made), strict=True)])

    def pixel_rows(self, made: Mapping[str, Any]) -> Tensor:
        """One row a tile."""
        return torch.tensor(_tiles(made))

    def _tower_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None) -> dict[str, Tensor]:
        """All tiles as those of one sample: which picture they are of is no matter to the image tower."""
        given = super()._tower_arguments(inputs, pixel_values)
        return {"pixel_values": given["pixel_values"].unsqueeze(0)}

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """The longer side fitted, then both to whole tiles, which are cut; the whole is shrunk to a tile from there.

        Raises:
            ValueError: If one side would have no pixel.
        """
        processor = self.processor.image_processor
        side, resample = processor.max_image_size["longest_edge"], processor.resample
        sizes = import_module(type(processor).__module__).get_resize_output_image_size  # of its own backend
        height, width = sizes(torch.empty(0, *image_size), processor.size["longest_edge"])
        fitted, whole = resize(height, width, resample), resize(side, side, resample)
        rows, columns = _grid(height, width, side)
        cut = [fitted, resize(rows * side, columns * side, resample)]
        if not processor.do_image_splitting:
            views = [[fitted, whole]]
        else:
            views = [cut] if rows * columns == 1 else [cut, [*cut, whole]]

        def arrange(made: list[Tensor]) -> Tensor:
            return torch.cat([tiles(view, side, side) for view in made], dim=1).flatten(0, 1)

        return Plan(views, arrange, read=lambda made: made["pixel_values"].flatten(0, 1))


def _grid(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of tiles: the longer side in whole ones, the other by what is then the picture's own shape."""
    aspect = width / height
    if width >= height:
        columns = math.ceil(width / side)
        return math.ceil(int(columns * side / aspect) / side), columns
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * aspect) / side)


def _tiles(made: Mapping[str, Any]) -> list[int]:
    """Tiles of every picture, the whole included; a picture that is not cut has that one alone."""
    rows, columns = ([int(one) for row in made[name] for one in row] for name in ("rows", "cols"))
    return [across * down + 1 for across, down in zip(rows, columns, strict=True)]


def _tokens_of_a_tile(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size // config.scale_factor) ** 2
