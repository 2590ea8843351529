"""LLaVA-1.5: a language model that sees one square out of the middle of a picture."""

from pathlib import Path
from typing import Any

from image_attacks import Plan, crop, resize
from mm_cb.models.laws import check_fields, check_pictures
from mm_cb.models.vision import VisionModel


class LlavaModel(VisionModel):
    """A ``LlavaForConditionalGeneration`` with its ``LlavaProcessor``.

    The published chat template writes no token behind an answer, so that a completion's span ends with its text.
    """

    model_types = ("llava",)
    text_types = ("llama", "mistral", "qwen2")

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `check_llava_processor`, and for squares of the image tower's size: cut out, or the picture squeezed."""
        check_llava_processor(processor, config, folder)
        side = config.vision_config.image_size
        square = {"height": side, "width": side}
        if processor.image_processor.do_center_crop:
            check_pictures(processor, folder, size={"shortest_edge": side}, crop_size=square)
        else:
            check_pictures(processor, folder, size=square)

    def _canvas(self) -> tuple[int, int]:
        """What the image tower sees: 336 x 336."""
        side = self.base.config.vision_config.image_size
        return side, side

    def largest_picture(self) -> int:
        """Tokens of any picture: the patches of the image tower, 576."""
        vision = self.base.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """The shorter side fitted to the square, then the middle of the longer one; without a crop both sides are.

        Raises:
            ValueError: If the image processor does something else.
        """
        processor = self.processor.image_processor
        if not processor.do_center_crop:
            return Plan([[resize(*self._canvas(), processor.resample)]], lambda views: views[0])
        side = _square(processor)
        height, width = image_size
        shorter, longer = min(height, width), int(side * max(height, width) / min(height, width))
        rows, columns = (longer, side) if shorter == width else (side, longer)
        middle = crop((rows - side) // 2, (columns - side) // 2, side, side)
        return Plan([[resize(rows, columns, processor.resample), middle]], lambda views: views[0])


def check_llava_processor(processor: Any, config: Any, folder: Path) -> None:
    """Refuse a processor that would write another number of tokens for a picture than the model has features.

    Raises:
        UserError: Naming the file and the field.
    """
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    expected = {"patch_size": config.vision_config.patch_size, "vision_feature_select_strategy": strategy}
    if strategy == "default":  # the image tower's class token is counted and then left out
        expected["num_additional_image_tokens"] = 1
    check_fields(processor, folder, **expected)


def _square(image_processor: Any) -> int:
    """The side of what is cut out.

    Raises:
        ValueError: If it is no square, not as wide as the shorter side gets, or the picture is padded before.
    """
    size, cut = dict(image_processor.size), dict(image_processor.crop_size)
    sides = {length for length in (*size.values(), cut["height"], cut["width"]) if length is not None}
    if len(sides) != 1 or "shortest_edge" not in size or getattr(image_processor, "do_pad", None):
        raise ValueError(
            "The image processor must fit the shorter side and cut a square of that size out, without padding; got "
            f"`size` {size}, `crop_size` {cut} and `do_pad` {getattr(image_processor, 'do_pad', None)}."
        )
    return sides.pop()
