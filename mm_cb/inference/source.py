"""Which model is to be measured, as the command line names it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_cb.core.hub import Repository


@dataclass(frozen=True)
class ModelSource:
    """A model with what it takes to load it."""

    model: str
    """Hub id, local directory, or an embedded model's name."""
    adapter: str | None = None
    """Folder of a PEFT adapter."""
    device: str = "cpu"
    dtype: str = "float32"
    endpoint: str | None = None
    """OpenAI-compatible address that serves the model under this name; None = in this process."""
    system: str | None = None
    """Text in front of every request."""

    def identity(self) -> dict[str, str | None]:
        """What belongs to a run's identity: that the model is served, not the address it is served at today."""
        return {**asdict(self), "endpoint": "served" if self.endpoint else None}

    def weights(self) -> list[Path | Repository]:
        """What is behind the names: files and repositories, whose content belongs to a run; nothing if it is served.

        Raises:
            UserError: If the model is neither here nor on the hub.
        """
        if self.endpoint is not None:
            return []
        from mm_cb.models.cache import model_inputs

        return [*model_inputs(self.model), *(sorted(Path(self.adapter).glob("*.safetensors")) if self.adapter else [])]


def subject_name(adapter: str | None, system: str | None) -> str:
    """What a model is called in results.json: ``base`` or ``rr``, with ``+safety_prompt`` behind it."""
    return ("rr" if adapter else "base") + ("+safety_prompt" if system is not None else "")
