"""Who is measured: a model, with its adapter on or off, perhaps behind a safety prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mm_cb.core.errors import UserError
from mm_cb.inference.source import ModelSource
from mm_cb.models import ChatModel, VisionModel, load_model
from mm_cb.models.probe import Probe, load_probe

_ASKED = "What is to be seen here?"


@dataclass(frozen=True)
class Subject:
    """One column of the table."""

    name: str
    model: ChatModel
    adapted: bool = False
    """Whether the adapter is on."""
    system: str | None = None
    """Text in front of every request."""
    probe: Probe | None = None
    """What withholds its answers."""

    @contextmanager
    def active(self) -> Iterator[ChatModel]:
        """The model in this subject's state."""
        held, self.model.probe = self.model.probe, self.probe
        try:
            with self.model.adapter(self.adapted):
                yield self.model
        finally:
            self.model.probe = held

    def systems(self, rows: int) -> list[str | None]:
        """The operator's text for each of ``rows`` chats."""
        return [self.system] * rows


@torch.no_grad()
def changes_nothing(subject: Subject) -> bool:
    """Whether the subject's adapter changes no logit, neither behind a text nor behind a picture.

    Raises:
        UserError: If logits are not finite.
    """
    model = subject.model
    states = (False, True) if subject.adapted else (False,)
    pictures: list[Image.Image | None] = [None]
    if isinstance(model, VisionModel):
        height, width = model.canvas
        pictures.append(Image.new("RGB", (width, height), (128, 128, 128)))
    for picture in pictures:
        inputs = model.encode([_ASKED], [picture])
        found = []
        for adapted in states:
            with model.adapter(adapted):
                found.append(model.forward(inputs).logits)
            if not bool(torch.isfinite(found[-1]).all()):
                who = f" {'with' if adapted else 'without'} its adapter" if subject.adapted else ""
                raise UserError(
                    f"`{model.name}`{who} must give finite logits in {found[-1].dtype}, got NaN or infinity; try "
                    "another `--dtype`, or other weights."
                )
        if len(found) == 2 and not torch.equal(*found):
            return False
    return subject.adapted


def idle_note(subject: Subject) -> str:
    """What to print of such a subject."""
    return (
        f"CAUTION the adapter of `{subject.name}` changes no logit of `{subject.model.name}`: what is measured is the "
        "base model, and nothing is claimed of a breaker"
    )


def load_subject(source: ModelSource, name: str, image_backend: str = "pil") -> Subject:
    """Load a model and, if it has one, its adapter, which is then on; ``image_backend`` resizes its pictures.

    Raises:
        UserError: If it cannot be loaded, or the operator's text is none for it.
    """
    model = load_model(
        source.model,
        adapter=source.adapter,
        base=source.base,
        device=source.device,
        dtype=source.dtype,
        image_backend=image_backend,
    )
    if source.thinking:
        if model.thinking_switch is None:
            raise UserError(
                "`--thinking` must be given a model whose chat template can leave a thinking block open, got "
                f"`{source.model}`; leave it out."
            )
        model.thinking = True
    if source.system is not None:
        _check_system(model, source.system)
    probe = None if source.probe is None else load_probe(Path(source.probe), model, source.adapter)
    return Subject(name, model, adapted=source.breaker, system=source.system, probe=probe)


def _check_system(model: ChatModel, system: str) -> None:
    """Refuse an operator's text that cannot stand in front of any request, before a request is blamed for it."""
    try:
        found = model.overlong(model.encode([_ASKED], [None], systems=[system]))
    except (UserError, ValueError) as error:
        raise UserError(f"the text of `--system` cannot be used: {error}") from error
    if found is not None:
        raise UserError(f"the text of `--system` is {found[1]} Shorten it.")
