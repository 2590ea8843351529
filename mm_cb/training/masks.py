"""Which tokens count in the losses."""

from typing import Literal

from torch import Tensor

from mm_cb.models import ModelInputs, TokenRole

MaskName = Literal["after_image", "user_and_assistant", "completion", "tool_call", "all"]


def loss_mask(inputs: ModelInputs, name: MaskName) -> Tensor:
    """1 for every token that counts in the loss, shape ``(B, T)``; padding never does.

    * ``after_image``: every token after the row's last image token, the template's included.
    * ``user_and_assistant``: the texts of the user and of the assistant, with the token that ends the assistant's turn,
      without the rest of the template.
    * ``completion``: the assistant's texts and tool calls, each with the token that ends it.
    * ``tool_call``: its tool calls alone.
    * ``all``: every real token, image tokens and template included.

    Args:
        inputs: The batch.
        name: One of the above.

    Returns:
        The mask, int64.

    Raises:
        ValueError: If a row has no image and ``after_image`` is asked for, or a row has no token that counts.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), section 4.2: tokens after the image embeddings for multimodal rows, user and
        assistant text for text rows. The released trainer's text rows count as ``all`` does.
    """
    roles = inputs.roles
    if name == "after_image":
        image = roles == TokenRole.IMAGE
        if not bool(image.any(-1).all()):
            raise ValueError("`after_image` needs an image in every row; use another mask for text rows.")
        still_to_come = image.flip(-1).cumsum(-1).flip(-1)
        mask = (still_to_come == 0) & inputs.attention_mask.bool()
    elif name == "user_and_assistant":
        mask = (roles == TokenRole.USER) | inputs.said
    elif name == "completion":
        mask = inputs.said
    elif name == "tool_call":
        mask = roles == TokenRole.CALL
    elif name == "all":
        mask = inputs.attention_mask.bool()
    else:
        raise ValueError(f"`name` must be after_image, user_and_assistant, completion, tool_call or all, got {name!r}.")
    if not bool(mask.any(-1).all()):
        empty = (~mask.any(-1)).nonzero()[:, 0].tolist()
        where = f" in rows {empty}" if len(mask) > 1 else ""
        raise ValueError(f"the mask `{name}` must select a token in every row, it selects none{where}.")
    return mask.long()


def without_ends(inputs: ModelInputs, mask: Tensor, end: int) -> Tensor:
    """The mask without the tokens that end answers, shape ``(B, T)``.

    What attention lets a token see lies before it: of a row of one exchange, the loss is what it would be of a row that
    stops with the answer's last word.

    Args:
        inputs: The batch.
        mask: What counts.
        end: Id of the token.

    Source:
        The released trainer's circuit-breaker rows stop there; its retain rows from UltraChat are ended, as ours.
    """
    ends = (inputs.roles == TokenRole.COMPLETION) & (inputs.input_ids == end)
    return mask.masked_fill(ends, 0)
