"""What the attacks on a model minimise: functions from pixels to one loss per behaviour.

Pixels are those of the picture a user would upload. They go through the model's own image processor (forward value
exact, gradient through a smooth surrogate, see `image_attacks.preprocessing`) into the model, in front of the same chat
that `generate` will see. The ones that know about circuit breakers are in `mm_cb.attacks.objectives.adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from image_attacks import predicted_nll, target_nll
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models import ChatModel, ModelInputs
from mm_cb.models.chat import Message, chat
from mm_cb.models.last_positions import only_last_positions


class Objective(Protocol):
    """What an attack minimises."""

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)`` in [0, 1]."""

    def loss(self, pixel_values: Tensor) -> Tensor:
        """Losses ``(B,)`` of what the processor makes of the pictures."""


@runtime_checkable
class Relaxed(Protocol):
    """An objective of something that is no picture: it has a start of its own, and is answered without a file."""

    def start(self) -> Tensor:
        """The variable, in [0, 1], at the clean pictures."""

    def answers(self, variable: Tensor, max_new_tokens: int) -> list[str]:
        """What the model says at a variable, one completion per behaviour."""


def target_objective(
    subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image], **settings: Any
) -> Objective:
    """The target's loss alone; it reads no further settings."""
    return TargetObjective(subject, behaviors, pictures)


class TargetLoss:
    """Mean negative log-likelihood of each behaviour's target text, by the whole model: what a file is held to."""

    def __init__(self, subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image | None]) -> None:
        """Encode the chats once."""
        self.subject = subject
        self.inputs = encode(subject, behaviors, pictures, [b.target for b in behaviors])
        # Rows are padded on the left, so that all targets end at the last token and few logits are needed.
        self.keep = longest(self.inputs) + 1
        self.labels = self.inputs.labels[:, -self.keep :]

    def loss(self, pixel_values: Tensor) -> Tensor:
        """Losses ``(B,)`` of what the processor makes of the pictures."""
        with self.subject.active() as model:
            output = model.forward(self.inputs, pixel_values=pixel_values, logits_to_keep=self.keep)
        return target_nll(output.logits, self.labels)


class TargetObjective(TargetLoss):
    """The target's loss as a function of pixels."""

    def __init__(self, subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image]) -> None:
        """Encode the chats once; ``pictures`` all have one size."""
        super().__init__(subject, behaviors, pictures)
        self.read = self.inputs.without_last()  # what the last token would say is asked of nobody
        self.preprocess = preprocessing(subject.model, pictures[0])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)``."""
        count = self.keep - 1
        with self.subject.active() as model, only_last_positions(model.base, count):
            output = model.forward(self.read, pixel_values=self.preprocess(pixels), logits_to_keep=count)
        return predicted_nll(output.logits, self.labels[:, 1:])


@dataclass(frozen=True)
class Forced:
    """Chats with a forced response behind them: the target and, as a rule, what the base model goes on to say.

    B rows, K = ``keep`` last positions; labels are unshifted, -100 where a token does not count.
    """

    inputs: ModelInputs
    keep: int
    target: Tensor
    """Labels ``(B, K)`` of the target's tokens."""
    response: Tensor
    """Labels ``(B, K)`` of the whole response."""
    texts: list[str]
    """The responses, for the record: with them the objective can be built again."""

    @property
    def mask(self) -> Tensor:
        """``(B, K)``: 1 = token of the response."""
        return (self.response != -100).long()


def force(
    subject: Subject,
    behaviors: Sequence[Behavior],
    pictures: Sequence[Image | None],
    max_new_tokens: int,
    responses: Sequence[str | None] | None = None,
) -> Forced:
    """Write each response (the target, continued by the base model on the clean picture) and encode the whole.

    Args:
        subject: The model under attack; the continuation is its base's, with the adapter off.
        behaviors: What to ask, one per row.
        pictures: Clean pictures, all of one size.
        max_new_tokens: Longest continuation.
        responses: Responses to use as they are, from an earlier run or from a hijack of the base; where there is none
            the base model continues the target. The first tokens, as many as the target has, count as the target.
    """
    opened = encode(subject, behaviors, pictures, [b.target for b in behaviors])
    given = list(responses) if responses is not None else [None] * len(behaviors)
    own = continue_targets(subject, behaviors, opened, max_new_tokens) if None in given else [""] * len(given)
    texts = [text if known is None else known for known, text in zip(given, own, strict=True)]
    inputs = encode(subject, behaviors, pictures, texts)
    keep = longest(inputs) + 1
    labels = inputs.labels[:, -keep:]
    position = inputs.completion_mask[:, -keep:].cumsum(dim=1)
    within_target = position <= opened.completion_mask.sum(dim=1, keepdim=True)
    return Forced(inputs, keep, labels.masked_fill(~within_target, -100), labels, texts)


def continue_targets(
    subject: Subject, behaviors: Sequence[Behavior], opened: ModelInputs, max_new_tokens: int
) -> list[str]:
    """Each target with what the base model itself says behind it: text from the model's own distribution."""
    with subject.model.adapter(False):
        continued = subject.model.generate(opened, max_new_tokens)
    return [f"{b.target} {more}".strip() for b, more in zip(behaviors, continued, strict=True)]


def encode(
    subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image | None], responses: Sequence[str] | None
) -> ModelInputs:
    """The subject's chats, padded on the left, with open responses behind them (none: ready to generate).

    Raises:
        UserError: If a chat has more tokens than the model has positions.
    """
    ends: Sequence[str | None] = [None] * len(behaviors) if responses is None else responses
    chats = [
        _chat(behavior, picture is not None, subject.system, end)
        for behavior, picture, end in zip(behaviors, pictures, ends, strict=True)
    ]
    shown = [[] if picture is None else [picture] for picture in pictures]
    tools = [behavior.tools for behavior in behaviors]
    inputs = subject.model.encode_chats(chats, shown, close_turn=False, tools=tools)
    if found := subject.model.overlong(inputs):
        row, told = found
        raise UserError(f"{behaviors[row].named} is {told} Shorten its prompt or target.")
    return inputs


def _chat(behavior: Behavior, pictured: bool, system: str | None, response: str | None) -> list[Message]:
    """The behaviour's own chat or its prompt, with picture and operator's text in front of the user's first turn."""
    if not behavior.messages:
        return chat(behavior.prompt, images=int(pictured), system=system, completion=response)
    first = next(place for place, turn in enumerate(behavior.messages) if turn["role"] == "user")
    opened = chat(behavior.messages[first]["content"], images=int(pictured), system=system)
    ended = [] if response is None else [{"role": "assistant", "content": response}]
    return [*behavior.messages[:first], *opened, *behavior.messages[first + 1 :], *ended]


def preprocessing(model: ChatModel, picture: Image) -> Callable[[Tensor], Tensor]:
    """The model's image processor as a differentiable function, for pictures of this one's size.

    Raises:
        UserError: If the processor has no differentiable counterpart here.
    """
    width, height = picture.size
    try:
        return model.preprocessing((height, width))
    except (ValueError, NotImplementedError, TypeError, KeyError, AttributeError) as error:  # a broken configuration
        name = type(model.processor.image_processor).__name__
        raise UserError(
            f"`{model.name}`: its image processor `{name}` has no differentiable counterpart for pictures of "
            f"{width} x {height}: {error} To attack it, describe it in the `plan` of the model's family, see "
            "docs/add_a_model.md."
        ) from error


def longest(inputs: ModelInputs) -> int:
    """Tokens of the longest completion."""
    return int(inputs.completion_mask.sum(dim=1).max())


def adapted_layers(model: ChatModel) -> list[int]:
    """``hidden_states`` indices right behind the decoder blocks that an adapter changes.

    Raises:
        UserError: If no block carries any: there is nothing to undo.
    """
    changed = set(model.changed_modules())
    layers = [
        index + 1
        for index, block in enumerate(model.decoder_blocks)
        if any(part in changed for part in block.modules())
    ]
    if not layers:
        raise UserError("`pgd_adaptive` needs a model whose decoder blocks an adapter changes, found none.")
    return layers
