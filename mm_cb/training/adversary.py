"""An adversary inside the model during training: it moves what the language tower sees of a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adversary:
    """How strong it is.

    Attributes:
        steps: Sign-gradient steps per batch; each costs one pass with the adapter on, and back.
        radius: Largest change of an entry of a row's picture embeddings, in units of their root mean square; each
            row's own is drawn between 0 and this.
        step: Size of a sign step as a share of the row's radius, our choice: large steps ended more often in breakers
            that answer to large steps alone.
    """

    steps: int
    radius: float
    step: float = 0.5


def perturb_pictures(
    embeds: Tensor,
    place: Tensor,
    lengths: Sequence[int],
    seeds: Sequence[int],
    alignment: Callable[[Tensor], Tensor],
    adversary: Adversary,
) -> Tensor:
    """Change the pictures' embeddings so that the adapted hidden states point where the base's of the clean ones do.

    The rerouting is then trained where a picture undoes it, and not only on clean pictures. A row's radius and start
    are its own, so that it does not matter which rows are run together. Radii are drawn: with one for all rows, some
    training runs learn what a few large sign steps look like and answer to that alone. The adversary then finds
    nothing while a small change of the picture undoes everything (catastrophic overfitting, arXiv:2001.03994).

    Args:
        embeds: What the language tower starts from, rows behind each other, shape ``(N, H)``.
        place: True where an embedding comes from a picture, shape ``(N,)``.
        lengths: Tokens of each row.
        seeds: What each row's radius and random start are drawn by.
        alignment: Maps embeddings of this shape to a scalar that the adversary raises, such as the summed cosine.
        adversary: Steps and radius.

    Returns:
        Embeddings, detached, that differ from ``embeds`` at ``place`` only, by at most ``radius`` root mean squares
        of the row's pictures.

    Source:
        Latent adversarial training, Sheshadri et al. 2024 (arXiv:2407.15549), here with an L-infinity ball and on
        embeddings of pictures alone: a picture is what the attacker chooses. Not part of Zou et al. 2024.
    """
    limits, starts = [], []
    for row, there, seed in zip(embeds.split(list(lengths)), place.split(list(lengths)), seeds, strict=True):
        size = adversary.radius * row[there].float().square().mean().nan_to_num().sqrt()  # 0 without a picture
        generator = torch.Generator(embeds.device).manual_seed(seed)
        size = size * torch.rand((), generator=generator, device=embeds.device)
        limits.append(size.to(embeds.dtype) * there.unsqueeze(-1))
        starts.append(torch.rand(row.shape, generator=generator, dtype=embeds.dtype, device=embeds.device))
    limit = torch.cat(limits)
    change = (2 * torch.cat(starts) - 1) * limit
    for _ in range(adversary.steps):
        change.requires_grad_(True)
        (gradient,) = torch.autograd.grad(alignment(embeds + change), change)
        change = (change.detach() + adversary.step * limit * gradient.sign()).clamp(-limit, limit)
    return embeds + change.detach()
