"""Which model is to be measured, as the command line names it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """A model with what it takes to load it."""

    model: str
    """Hub id, local directory, or ``miniature``."""
    adapter: str | None = None
    """Folder of a PEFT adapter."""
    device: str = "cpu"
    dtype: str = "float32"
    endpoint: str | None = None
    """OpenAI-compatible address that serves the model under this name; None = in this process."""
    system: str | None = None
    """Text in front of every request."""

    def identity(self) -> dict[str, Any]:
        """What belongs to a run's identity: that the model is served, not the address it is served at today."""
        return {**asdict(self), "endpoint": "served" if self.endpoint else None}


def subject_name(adapter: str | None, system: str | None) -> str:
    """What a model is called in results.json: ``base`` or ``rr``, with ``+safety_prompt`` behind it."""
    return ("rr" if adapter else "base") + ("+safety_prompt" if system is not None else "")
