"""Attacks that make no picture: what is sent, and what the model says to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from image_attacks import target_nll
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.judged_files import Asked, OutcomeOf, complete, judge_samples, with_verdicts
from mm_cb.attacks.objectives.target import encode, longest
from mm_cb.attacks.records import JudgedPicture, Sampled
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.prompts_file import ImportedPrompt, messages_hash
from mm_cb.inference.subjects import Subject


def ask(
    subject: Subject,
    behaviors: Sequence[Behavior],
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None = None,
    number: int = 0,
) -> Asked:
    """Behaviours as they are sent: their prompts, or no. ``number`` of the imported ones.

    Args:
        subject: The model under attack.
        behaviors: What to ask.
        prompts: Behaviour id → imported prompts; None = the behaviours' own.
        number: Which of them, from 0.
    """
    if prompts is None:
        return Asked(subject, behaviors, behaviors, ())
    sent = [replace(one, messages=prompts[one.id][number].messages) for one in behaviors]
    return Asked(subject, behaviors, sent, ())


@torch.no_grad()
def target_losses(asked: Asked) -> Tensor:
    """The target's loss behind what is sent, ``(B,)``; earlier answers of a chat do not count."""
    inputs = encode(asked.subject, asked.prompts, asked.pictures, [one.target for one in asked.prompts])
    last = inputs.completion_mask.flip(1).cumprod(dim=1).flip(1)  # rows end with the target
    keep = longest(inputs) + 1
    with asked.subject.active() as model:
        logits = model.forward(inputs, logits_to_keep=keep).logits
    return target_nll(logits, inputs.labels.masked_fill(last == 0, -100)[:, -keep:])


def judge(
    asked: Asked,
    config: AttackConfig,
    judge_of: OutcomeOf,
    draws: Sequence[torch.Generator],
    show: Callable[[int], None],
) -> dict[int, JudgedPicture]:
    """Greedy answers to the texts with their losses and verdicts, and answers drawn at random: row → what was judged.

    Args:
        asked: Who is asked what.
        config: The attack.
        judge_of: Gives the verdicts.
        draws: Random streams, one per behaviour.
        show: Told how many more of the random answers are drawn or weighed.
    """
    losses, pictures = target_losses(asked), asked.pictures
    said, found = complete(asked, pictures, config), {}
    for i, answer in enumerate(with_verdicts(asked, said, losses, judge_of, weighed=config.artefacts)):
        sent = asked.prompts[i].messages
        drawn: Sequence[Sampled] = ()
        if config.samples:
            drawn = judge_samples(asked.rows([i]), pictures[i], config, judge_of, draws[i], show)
        found[i] = JudgedPicture(replace(answer, prompt_sha256=messages_hash(sent) if sent else None), drawn)
    return found
