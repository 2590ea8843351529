"""Descriptions of pictures, from a model behind an address or from one on this machine; both greedy."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from mm_cb.core.endpoint import Endpoint, EndpointFailure, user_message
from mm_cb.core.errors import UserError
from mm_cb.core.records import Message
from mm_cb.data.pictures import open_picture

INSTRUCTION = "Describe this picture in detail."
MAX_TOKENS = 512
CORRUPT = "corrupt picture"
"""The kind of failure that asking again does not mend."""
_BATCH = 8

Described = Iterator[tuple[str, str | EndpointFailure]]


def describe_by_endpoint(endpoint: Endpoint, pictures: Iterable[tuple[str, Path]]) -> Described:
    """Ask a server for descriptions; pictures that cannot be read are failures of their own."""
    broken: list[tuple[str, EndpointFailure]] = []

    def requests() -> Iterator[tuple[str, list[Message]]]:
        for key, path in pictures:
            image = _open(path)
            if isinstance(image, EndpointFailure):
                broken.append((key, image))
            else:
                yield key, [user_message(INSTRUCTION, [image])]

    yield from endpoint.map(requests(), max_tokens=MAX_TOKENS, temperature=0.0)
    yield from broken


def describe_by_model(model: Any, pictures: Iterable[tuple[str, Path]], max_tokens: int = MAX_TOKENS) -> Described:
    """Generate descriptions in batches with a model that `mm_cb.models.load_model` gave."""
    waiting = iter(pictures)
    while chunk := list(islice(waiting, _BATCH)):
        opened = [(key, _open(path)) for key, path in chunk]
        whole = [(key, image) for key, image in opened if isinstance(image, Image.Image)]
        yield from ((key, image) for key, image in opened if isinstance(image, EndpointFailure))
        if whole:
            inputs = model.encode([INSTRUCTION] * len(whole), [image for _, image in whole])
            yield from zip((key for key, _ in whole), model.generate(inputs, max_tokens), strict=True)


def _open(path: Path) -> Image.Image | EndpointFailure:
    try:
        return open_picture(path)
    except UserError as error:
        return EndpointFailure(CORRUPT, str(error))
