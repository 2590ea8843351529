"""A batch of chats as the tensors that a model takes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mm_cb.models.chat import TokenRole


@dataclass(frozen=True)
class ModelInputs:
    """A padded batch of chats. B rows, T tokens, N images in all (rows without an image may mix with others).

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 1 = real token, 0 = padding.
        roles: ``(B, T)``, a ``TokenRole`` per token.
        pixel_values: ``(N, tiles, 3, h, w)`` in row order, or None.
        image_sizes: ``(N, 2)``, height and width of every picture in pixels, or None.
        images_per_row: ``(B,)``, how many of the pictures are each row's, or None without pictures.
    """

    input_ids: Tensor
    attention_mask: Tensor
    roles: Tensor
    pixel_values: Tensor | None = None
    image_sizes: Tensor | None = None
    images_per_row: Tensor | None = None

    @property
    def completion_mask(self) -> Tensor:
        """``(B, T)``: 1 = token of the completion, the one that ends the turn included."""
        return (self.roles == TokenRole.COMPLETION).long()

    @property
    def labels(self) -> Tensor:
        """``(B, T)``: ``input_ids`` where the completion is, -100 elsewhere; not shifted."""
        return self.input_ids.masked_fill(self.roles != TokenRole.COMPLETION, -100)

    @property
    def position_ids(self) -> Tensor:
        """``(B, T)``: positions that start at the first real token, as ``generate`` counts them."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def without_last(self) -> "ModelInputs":
        """The batch without its last column: enough where the last token is predicted and nothing behind it."""
        tokens = (self.input_ids, self.attention_mask, self.roles)
        ids, mask, roles = (column[:, :-1] for column in tokens)
        return replace(self, input_ids=ids, attention_mask=mask, roles=roles)

    def rows(self, start: int, stop: int) -> "ModelInputs":
        """Rows ``start`` to ``stop - 1`` with their pictures; padding stays."""
        part = slice(start, stop)
        tokens = (self.input_ids[part], self.attention_mask[part], self.roles[part])
        if self.pixel_values is None or self.image_sizes is None or self.images_per_row is None:
            return ModelInputs(*tokens)
        images = slice(int(self.images_per_row[:start].sum()), int(self.images_per_row[:stop].sum()))
        if images.start == images.stop:
            return ModelInputs(*tokens)
        return ModelInputs(*tokens, self.pixel_values[images], self.image_sizes[images], self.images_per_row[part])

    def to(self, device: torch.device | str) -> "ModelInputs":
        """The same batch on another device."""
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)


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
