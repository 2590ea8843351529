"""From the pixels of an image file to what a vision-language model takes: exact forward, smooth backward."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .arguments import whole
from .png import to_levels
from .resampling import trial_images
from .straight_through import StraightThrough
from .views import Plan, Views

SURROGATE_TOLERANCE = 1.2
"""Largest accepted distance between the surrogate and the real processor, in 8-bit levels for each resize."""


class ExactPreprocessing:
    """A model's image processor for images of one size, as a function to attack through.

    Forward: bit for bit what the given image processor makes of the image rounded to 8 bits, that is of the file
    :func:`~image_attacks.save_png` would write. Backward: the gradient of :meth:`surrogate`, taken at the rounded
    values and straight through the rounding (backward-pass differentiable approximation, Athalye et al. 2018,
    arXiv:1802.00420). Padding takes no gradient.

    The forward is a vectorised imitation of the processor by the plan's views where that reproduces the processor on
    test images, else (``exact_by == "processor"``) the processor itself, image by image.

    >>> plan = Plan([[resize(336, 448), crop(0, 56, 336, 336)]], lambda views: views[0])       # doctest: +SKIP
    >>> preprocess = ExactPreprocessing(processor.image_processor, (480, 640), plan)           # doctest: +SKIP
    >>> preprocess(torch.rand(1, 3, 480, 640)).shape                                           # doctest: +SKIP
    torch.Size([1, 3, 336, 336])
    """

    def __init__(self, image_processor: Any, image_size: tuple[int, int], plan: Plan) -> None:
        """Build the plan's views for images of this size and check them against the processor.

        Args:
            image_processor: A Hugging Face image processor, Pillow or torchvision backend.
            image_size: Height and width of the images to attack.
            plan: What the processor does with images of this size.

        Raises:
            ValueError: If the processor does something else.
        """
        self.image_size = _whole_pair(image_size)
        self._processor, self._plan = image_processor, plan
        backend = getattr(image_processor, "backend", "pil")
        self._views = Views(plan.views, self.image_size, backend)
        self._table = level_table(image_processor)
        self._emulated = True
        self._check()

    @property
    def exact_by(self) -> str:
        """Say what computes the forward: "emulation" (fast) or "processor" (the real one, image by image)."""
        return "emulation" if self._emulated else "processor"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Turn pixels into the model's input.

        Args:
            pixels: Values in [0, 1], shape ``(B, 3, H, W)`` with the H and W given at construction.

        Returns:
            ``pixel_values`` as the plan arranges them, float32.

        Raises:
            ValueError: If the shape is another one or a value is outside [0, 1].
            TypeError: If the pixels are not float32.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(f"`pixels` must have shape (B, 3, {self.image_size}), got {tuple(pixels.shape)}.")
        if pixels.dtype != torch.float32:
            raise TypeError(f"`pixels` must be float32, got {pixels.dtype}.")
        if self._emulated:
            return self._emulate(pixels)
        exact = self._call_processor(to_levels(pixels.detach())).to(pixels.device)
        return StraightThrough.apply(self.surrogate(pixels), exact)

    def _emulate(self, pixels: Tensor) -> Tensor:
        self._to(pixels.device)
        levels = _Levels.apply(pixels)
        return self._plan.arrange([_Lookup.apply(view, self._table) for view in self._views.exact(levels)])

    def surrogate(self, pixels: Tensor) -> Tensor:
        """Compute the same without rounding: smooth, within 1.2 levels a resize of the real thing on 8-bit images."""
        self._to(pixels.device)
        low, high = self._table.to(pixels)[:, [0, 255]].view(3, 2, 1, 1).unbind(dim=1)
        return self._plan.arrange([torch.addcmul(low, view, high - low) for view in self._views.smooth(pixels)])

    def _to(self, device: torch.device) -> None:
        """Keep the constants where the pixels are, instead of copying them at every step."""
        if self._table.device != device:
            self._table = self._table.to(device)
            self._views.to(device)

    def _check(self) -> None:
        """Compare with the processor on test images, one after another: no more memory than an attack takes."""
        largest, tolerance = 0.0, SURROGATE_TOLERANCE * max(self._plan.resizes, 1)
        level = self._level_sizes()
        for levels, real in self._shown():
            emulated, smooth = self._emulate(levels.float() / 255), self.surrogate(levels.float() / 255)
            if emulated.shape != real.shape:
                raise ValueError(
                    f"The image processor returned shape {tuple(real.shape)} for images of {self.image_size}, expected "
                    f"{tuple(emulated.shape)}: it does not follow the plan."
                )
            self._emulated &= torch.equal(emulated, real)
            errors = ((smooth - real).abs() / level).nan_to_num(nan=0.0, posinf=torch.inf)
            largest = max(largest, float(errors.max()))
        if not largest <= tolerance:
            raise ValueError(
                f"The image processor differs from its plan by {largest:.1f} levels for images of {self.image_size} "
                f"(at most {tolerance:.1f} expected); it cannot be attacked through."
            )

    def _shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and what the processor makes of each."""
        for levels in trial_images(self.image_size):
            yield levels, self._call_processor(levels)

    def _level_sizes(self) -> Tensor:
        """How much one level is, for every entry of what the model takes of one image; 0 where nothing is shown."""
        level = (self._table[:, 255] - self._table[:, 0]).view(1, 3, 1, 1).abs() / 255
        return self._plan.arrange([level.expand(1, 3, *size) for size in self._views.sizes])

    def _call_processor(self, levels: Tensor) -> Tensor:
        """Run the real processor on whole levels ``(B, 3, H, W)``."""
        arrays = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        images: list[Any] = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
        if self._plan.nested:
            images = [[image] for image in images]
        return self._plan.read(self._processor(images=images, return_tensors="pt", **self._plan.options)).float()


def level_table(processor: Any) -> Tensor:
    """What a processor's rescaling and normalising make of each of the 256 levels: shape ``(3, 256)``, float32."""
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256).contiguous()
    if getattr(processor, "backend", "pil") == "torchvision":
        shown = processor.rescale_and_normalize(
            levels[None],
            processor.do_rescale,
            processor.rescale_factor,
            processor.do_normalize,
            _fixed(processor.image_mean),
            _fixed(processor.image_std),
        )
        return shown[0, :, 0].float().contiguous()
    values: Any = levels.numpy()
    if processor.do_rescale:
        values = processor.rescale(values, processor.rescale_factor)
    if processor.do_normalize:
        values = processor.normalize(values, processor.image_mean, processor.image_std)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[:, 0].contiguous()


def _fixed(values: Any) -> Any:
    """A list as a tuple, because the processor remembers results by its arguments."""
    return tuple(values) if isinstance(values, list) else values


class _Levels(torch.autograd.Function):
    """Pixels as whole levels; backward as if they were not rounded."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        return to_levels(pixels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 255


class _Lookup(torch.autograd.Function):
    """Replace whole levels ``(..., 3, h, w)`` by the processor's values; backward as if the table were a line."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward((table[:, 255] - table[:, 0]).view(3, 1, 1) / 255)
        entries = levels.int().add_(256 * torch.arange(3, dtype=torch.int32, device=levels.device).view(3, 1, 1))
        return table.flatten().index_select(0, entries.flatten()).view(levels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


def _whole_pair(image_size: tuple[int, int]) -> tuple[int, int]:
    height, width = (whole("image_size", side, "(height, width) in whole pixels") for side in image_size)
    if min(height, width) < 1:
        raise ValueError(f"`image_size` must be (height, width) in whole pixels, got {image_size!r}.")
    return height, width
