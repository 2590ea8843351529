"""Training examples as text, with the tokens that count in the losses marked: what a run would learn from."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from mm_cb.data.examples import Example, Modality
from mm_cb.models import ChatModel, TokenRole
from mm_cb.training.masks import MaskName, loss_mask


def first_of_each_source(examples: Iterable[Example]) -> Iterator[Example]:
    """The first example of every source, set and modality, in order."""
    seen = set()
    for example in examples:
        kind = (example.source, example.set, example.modality)
        if kind not in seen:
            seen.add(kind)
            yield example


def marked(model: ChatModel, example: Example, masks: Mapping[Modality, MaskName]) -> str:
    """The example as the model reads it, with what counts in the losses in brackets: ``[INST] ⟦tell me⟧ [/INST]``.

    Args:
        model: Encodes; its weights are not used, so a model of shapes will do.
        example: What to show.
        masks: Which tokens count in rows of each modality.

    Returns:
        The decoded tokens, image tokens as ``<image x 78>``.

    Raises:
        ValueError: If the example cannot be encoded, or none of its tokens would count.
    """
    pictures, tools = [example.open_images()], [example.tools]
    inputs = model.encode_chats([example.messages], pictures, padding_side="right", tools=tools)
    counted = loss_mask(inputs, masks[example.modality])[0].tolist()
    roles = inputs.roles[0].tolist()
    pieces = []
    tokens = zip(inputs.input_ids[0].tolist(), counted, roles, strict=True)
    for (counts, image), run in groupby(tokens, key=lambda token: (token[1], token[2] == TokenRole.IMAGE)):
        ids = [token[0] for token in run]
        text = f"<image x {len(ids)}>" if image else model.processor.tokenizer.decode(ids)
        pieces.append(f"⟦{text}⟧" if counts else text)
    return "".join(pieces)
