"""Who is measured: a model, with its adapter on or off, perhaps behind a safety prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mm_cb.inference.source import ModelSource
from mm_cb.models import ChatModel, load_model


@dataclass(frozen=True)
class Subject:
    """One column of the table."""

    name: str
    model: ChatModel
    adapted: bool = False
    """Whether the adapter is on."""
    system: str | None = None
    """Text in front of every request."""

    @contextmanager
    def active(self) -> Iterator[ChatModel]:
        """The model in this subject's state."""
        with self.model.adapter(self.adapted):
            yield self.model

    def systems(self, rows: int) -> list[str | None]:
        """The operator's text for each of ``rows`` chats."""
        return [self.system] * rows


def load_subject(source: ModelSource, name: str, image_backend: str = "pil") -> Subject:
    """Load a model and, if it has one, its adapter, which is then on; ``image_backend`` resizes its pictures."""
    model = load_model(
        source.model, adapter=source.adapter, device=source.device, dtype=source.dtype, image_backend=image_backend
    )
    return Subject(name, model, adapted=source.adapter is not None, system=source.system)
