"""How MMMU is asked: everything that ``key=value`` can change."""

from __future__ import annotations

from dataclasses import dataclass, field

from mm_cb.benchmarks.mmmu.protocol import chosen_subjects, protocol
from mm_cb.core.errors import UserError, unknown

PICTURES = ("named", "first")


@dataclass(frozen=True)
class StoredSettings:
    """Of answers that are there already."""

    subjects: tuple[str, ...] = ()
    """MMMU subjects to score, comma-separated; none named means all that there must be."""

    def __post_init__(self) -> None:
        chosen_subjects(self.subjects)


@dataclass(frozen=True)
class Settings(StoredSettings):
    """Of a model that is asked."""

    split: str = "validation"
    """``validation`` or ``dev``; the answers of ``test`` are withheld."""
    prompt: str = "official"
    """``official`` or ``lmms_eval``."""
    pictures: str = "named"
    """``named``: every picture that the question names, by number (as lmms-eval); ``first``: always and only the first
    one (as the official code does in effect)."""
    max_new_tokens: int = field(default_factory=lambda: protocol().max_new_tokens)
    """The reference harness's 128 by default."""
    limit: int = 0
    """First so many questions of each subject, for a trial; 0 = all."""
    batch: int = 8
    """Questions answered at once, or requests under way at an endpoint. No part of the run's identity: answers do not
    depend on it (in float32; in lower precision a few may flip)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in protocol().questions:
            raise UserError(
                f"`split` must be one of {', '.join(protocol().questions)} (the answers of `test` are withheld), got "
                f"`{self.split}`."
            )
        if self.prompt not in protocol().prompts:
            raise unknown("prompt", self.prompt, protocol().prompts)
        if self.pictures not in PICTURES:
            raise unknown("choice of pictures", self.pictures, PICTURES)
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
