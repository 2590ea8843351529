"""A batch of chats as the tensors that a model takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm_cb.models.chat import TokenRole

Arguments = dict[str, Any]
"""Keyword arguments for transformers: what they are is its own affair, and each family's."""


class Pictures(NamedTuple):
    """N pictures as a model takes them.

    Attributes:
        pixel_values: The pictures, along the first axis, each in one row of it or in several.
        beside: What the model takes beside the pixels, one entry a picture along the first axis.
        pixel_rows: ``(N,)``, rows of ``pixel_values`` of every picture; None = one each.
    """

    pixel_values: Tensor
    beside: Mapping[str, Tensor]
    pixel_rows: Tensor | None = None


class Shown(NamedTuple):
    """Pictures as a model takes them, and the tokens that stand for each."""

    pictures: Pictures
    tokens: list[str]


@dataclass(frozen=True)
class ModelInputs:
    """A padded batch of chats. B rows, T tokens, N images in all (rows without an image may mix with others).

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 1 = real token, 0 = padding.
        roles: ``(B, T)``, a ``TokenRole`` per token.
        pixel_values: All pictures in row order, or None: ``(N, ...)``, or patches of all behind each other.
        images_per_row: ``(B,)``, how many of the pictures are each row's, or None without pictures.
        beside: What the model takes beside the pixels, one entry a picture along the first axis: their sizes, say.
        pixel_rows: ``(N,)``, rows of ``pixel_values`` of every picture; None = one each.
    """

    input_ids: Tensor
    attention_mask: Tensor
    roles: Tensor
    pixel_values: Tensor | None = None
    images_per_row: Tensor | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    pixel_rows: Tensor | None = None

    @property
    def said(self) -> Tensor:
        """``(B, T)``: True for what the assistant says, its calls of tools too."""
        return (self.roles == TokenRole.COMPLETION) | (self.roles == TokenRole.CALL)

    @property
    def completion_mask(self) -> Tensor:
        """``(B, T)``: 1 = token of the completion, the one that ends the turn included."""
        return self.said.long()

    @property
    def labels(self) -> Tensor:
        """``(B, T)``: ``input_ids`` where the completion is, -100 elsewhere; not shifted."""
        return self.input_ids.masked_fill(~self.said, -100)

    @property
    def image_mask(self) -> Tensor:
        """``(B, T)``: True where a token stands for a part of a picture."""
        return self.roles == TokenRole.IMAGE

    @property
    def text_positions(self) -> Tensor:
        """``(B, T)``: positions that start at the first real token; a model may have others, `ChatModel.positions`."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def without_last(self) -> "ModelInputs":
        """The batch without its last column: enough where the last token is predicted and nothing behind it."""
        return self.columns(0, self.input_ids.shape[1] - 1)

    def columns(self, start: int, stop: int) -> "ModelInputs":
        """Columns ``start`` to ``stop - 1`` with all pictures."""
        tokens = (self.input_ids, self.attention_mask, self.roles)
        ids, mask, roles = (column[:, start:stop] for column in tokens)
        return replace(self, input_ids=ids, attention_mask=mask, roles=roles)

    def rows(self, start: int, stop: int) -> "ModelInputs":
        """Rows ``start`` to ``stop - 1`` with their pictures; padding stays."""
        part = slice(start, stop)
        tokens = (self.input_ids[part], self.attention_mask[part], self.roles[part])
        if self.pixel_values is None or self.images_per_row is None:
            return ModelInputs(*tokens)
        images = slice(int(self.images_per_row[:start].sum()), int(self.images_per_row[:stop].sum()))
        if images.start == images.stop:
            return ModelInputs(*tokens)
        beside = {name: value[images] for name, value in self.beside.items()}
        pixels, own = images, None
        if self.pixel_rows is not None:
            own = self.pixel_rows[images]
            pixels = slice(*(int(self.pixel_rows[:end].sum()) for end in (images.start, images.stop)))
        return ModelInputs(*tokens, self.pixel_values[pixels], self.images_per_row[part], beside, own)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ModelInputs":
        """The same batch on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ModelInputs":
        """The same batch where a GPU copies it from while it works; torch's loader asks for it by this name."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "ModelInputs":
        """The same batch with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed, beside={name: change(value) for name, value in self.beside.items()})


def side_by_side(parts: Sequence[Shown]) -> Shown:
    """The pictures of several chats as an image processor gives them together: behind each other, padded with zeros."""
    pictures = [part.pictures for part in parts]
    rows = [one.pixel_rows for one in pictures if one.pixel_rows is not None]
    beside = {name: _stacked([one.beside[name] for one in pictures]) for name in pictures[0].beside}
    pixels = _stacked([one.pixel_values for one in pictures])
    tokens = [token for part in parts for token in part.tokens]
    return Shown(Pictures(pixels, beside, torch.cat(rows) if rows else None), tokens)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors ``(N, ...)`` behind each other, the smaller ones with zeros at the ends of their other axes."""
    shape = [max(sides) for sides in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *shape)
    start = 0
    for part in parts:
        whole[(slice(start, start := start + len(part)), *map(slice, part.shape[1:]))] = part
    return whole


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad_id: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Stack rows of (ids, roles) to ``(B, T)``: ids, attention mask, roles."""
    if side not in ("left", "right"):
        raise ValueError(f'`padding_side` must be "left" or "right", got {side!r}.')
    width = max(len(ids) for ids, _ in rows)
    shape = (len(rows), width)
    ids, mask, roles = torch.full(shape, pad_id), torch.zeros(shape).long(), torch.zeros(shape).long()
    for i, (row_ids, row_roles) in enumerate(rows):
        real = slice(width - len(row_ids), width) if side == "left" else slice(0, len(row_ids))
        ids[i, real], mask[i, real], roles[i, real] = torch.tensor(row_ids), 1, torch.tensor(row_roles)
    return ids, mask, roles
