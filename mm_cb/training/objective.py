"""What a run minimises, on a part of a batch: the losses between hidden states with the adapter on and off."""

import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm_cb.core.errors import UserError
from mm_cb.data.examples import SETS, SetName
from mm_cb.models import ChatModel, TokenRole
from mm_cb.models.dial import lora_turned
from mm_cb.training.adversary import Adversary, perturb_pictures
from mm_cb.training.batches import Batch, SetRows
from mm_cb.training.hidden_states import (
    Rows,
    adapted_states,
    hidden_states,
    lay_out,
    reference_states,
    target_states,
)
from mm_cb.training.losses import (
    Retain,
    RetainAverage,
    RetainLayers,
    RetainScale,
    kl_retain_loss,
    length_loss,
    retain_loss,
)
from mm_cb.training.placement import first_adapted_block
from mm_cb.training.registry import loss_entry

LOGITS_OF = 256
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Rerouting:
    """What the loss is made of.

    Attributes:
        alpha: Sum of both loss weights.
        target_layers: Indices into ``hidden_states`` to reroute: 0 = embeddings, k = output of block k - 1.
        retain_layers: ``all`` (embeddings to the last kept state) or ``targets``.
        retain_average: ``tokens`` or ``official``, see `mm_cb.training.losses.retain_positions`.
        adversary: What changes the pictures of circuit-breaker rows before each pass; None for nothing (paper).
        keep_length: Weight of `length_loss` beside the reroute loss; 0 for none (paper).
        loss: The reroute loss, by its name in `mm_cb.training.registry`.
        settings: All of its settings.
        retain_scale: ``absolute`` or ``relative``, see `mm_cb.training.losses.retain_loss`.
        schedule_steps: Steps T of the schedule; None for those of the run (paper).
        retain: ``l2``, of hidden states (paper), or ``kl``, of what the head makes of the last ones.
        dial_from: The smallest share of the adapter at which rows are rerouted, see `share_of_adapter`; 1 (paper).
    """

    alpha: float
    target_layers: tuple[int, ...]
    retain_layers: RetainLayers = "all"
    retain_average: RetainAverage = "tokens"
    adversary: Adversary | None = None
    keep_length: float = 0.0
    loss: str = "rr"
    settings: Mapping[str, float] = field(default_factory=dict)
    retain_scale: RetainScale = "absolute"
    schedule_steps: int | None = None
    retain: Retain = "l2"
    dial_from: float = 1.0


def share_of_adapter(dial_from: float, seed: int, step: int) -> float:
    """At which share of the adapter a step reroutes: all of it in two steps, one drawn from ``dial_from`` to 1 in two.

    An attack that dials the adapter up from zero (`pgd_homotopy`) follows a path on which little changes at a time.
    Where less of the adapter reroutes as all of it does, that path has a cliff. Two steps: one of each modality.

    Args:
        dial_from: The smallest share; 1 = always all of it (paper).
        seed: Of the run.
        step: Finished optimiser steps.

    Source:
        Ours, not in Zou et al. 2024; results/dial_training.json.
    """
    if dial_from == 1 or step // 2 % 2 == 0:
        return 1.0
    return random.Random(f"{seed} {step}").uniform(dial_from, 1.0)


class TrainingObjective:
    """The losses of one model with its adapter.

    Attributes:
        model: The model.
        options: What the losses are.
        loss: The entry of the reroute loss.
        first_block: The lowest decoder block with LoRA.
    """

    def __init__(self, model: ChatModel, options: Rerouting, seed: int) -> None:
        """Take a model that is on its device; ``seed`` is the run's, for what the adversary and the loss draw."""
        self.model, self.options, self._seed = model, options, seed
        self.loss = loss_entry(options.loss)
        self.first_block = first_adapted_block(model)

    def rows(self, given: SetRows) -> Rows:
        """The real tokens of one set of a collated batch."""
        return lay_out(self.model, given["inputs"], given["mask"], given["lengths"], given["counted"])

    def reroute(self, given: SetRows, count: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """L_s and the length loss (0 where it has no weight); circuit-breaker rows stop at the top target."""
        rows = self.rows(given)
        if self.options.adversary is not None and given["inputs"].pixel_values is not None:
            rows = rows._replace(embeds=self._attack(given, rows, step, self.options.adversary))
        with lora_turned(self.model.model, share_of_adapter(self.options.dial_from, self._seed, step)):
            adapted, reference, mask = _of_counted(rows, *target_states(self.model, rows, *self.layers))
        drawn = self.loss.draw(self._seed, step)
        rerouted = self.loss.function(adapted, reference, mask, count=count, **drawn, **self.options.settings)
        _refuse_other_than_a_loss(rerouted, self.loss.name, adapted)
        if not self.options.keep_length:
            return rerouted, torch.zeros_like(rerouted)
        return rerouted, length_loss(adapted, reference, mask, count=count)

    def retain(self, given: SetRows, count: Tensor) -> Tensor:
        """L_r, between hidden states or between logits."""
        return self._divergence(given, count) if self.options.retain == "kl" else self._distance(given, count)

    def _divergence(self, given: SetRows, count: Tensor) -> Tensor:
        """L_r of logits, of some tokens at a time: those of all would take more memory than the model."""
        rows = self.rows(given)
        states = hidden_states(self.model, rows, self.first_block, len(self.model.decoder_blocks))
        sides = [side[-1][rows.mask.bool()].split(LOGITS_OF) for side in (states.adapted, states.reference)]

        def part(adapted: Tensor, reference: Tensor) -> Tensor:
            logits, mask = self.model.logits(adapted), torch.ones(len(adapted), device=adapted.device)
            return kl_retain_loss(logits, self.model.logits(reference), mask, count=count)

        parts = [
            checkpoint(part, *some, use_reentrant=False, preserve_rng_state=False) for some in zip(*sides, strict=True)
        ]
        return torch.stack(parts).sum()

    def _distance(self, given: SetRows, count: Tensor) -> Tensor:
        """L_r of one hidden state at a time; those below the adapter count, and are exact zeros."""
        options, first = self.options, self.first_block
        chosen = range(len(self.model.decoder_blocks) + 1) if options.retain_layers == "all" else options.target_layers
        rows = self.rows(given)
        states = hidden_states(self.model, rows, first, max(chosen))
        distances = [
            retain_loss(adapted[None], reference[None], rows.mask, scale=options.retain_scale, count=count)
            for layer, (reference, adapted) in enumerate(zip(*states, strict=True), first + 1)
            if layer in chosen
        ]
        return torch.stack(distances).sum() / len(chosen)

    @torch.no_grad()
    def measure(self, parts: Iterable[Batch], step: int) -> dict[str, float]:
        """Cosine to the reference, norms of both and the loss's own measure, at the target layers, over counted tokens.

        Args:
            parts: Parts of collated batches, each of one set.
            step: Finished optimiser steps, for a loss that draws.
        """
        own, own_measure = self.loss.measure or ("", None)
        names = ["cosine", "norm_reference", "norm_adapted", *([own] if own_measure else [])]
        sums = {name: torch.zeros(len(names) + 1) for name in SETS}
        for part in parts:
            name: SetName = "retain" if "retain" in part else "circuit_breaker"
            rows = self.rows(part[name])
            states = target_states(self.model, rows, *self.layers)
            adapted, reference = (side[:, rows.mask.bool()].float() for side in states)
            values = [torch.cosine_similarity(adapted, reference, dim=-1), reference.norm(dim=-1)]
            values += [adapted.norm(dim=-1)]
            if own_measure is not None:
                values.append(own_measure(adapted, **self.loss.draw(self._seed, step)))
            values.append(torch.ones_like(values[0]))
            sums[name] += torch.stack(values).sum((1, 2)).cpu()
        return {
            f"held_out_{name}_{key}": value
            for name, total in sums.items()
            for key, value in zip(names, (total[:-1] / total[-1]).tolist(), strict=True)
        }

    @property
    def layers(self) -> tuple[int, tuple[int, ...]]:
        """The first block with LoRA, and the hidden states to reroute."""
        return self.first_block, self.options.target_layers

    def _attack(self, given: SetRows, rows: Rows, step: int, adversary: Adversary) -> Tensor:
        """Embeddings under which the adapted states point where the reference ones of the clean pictures do again."""
        batch, counted = given["inputs"], rows.mask.bool()
        place = batch.roles[batch.attention_mask.bool()] == TokenRole.IMAGE
        drawn_by = (f"{self._seed} {step} {name}" for name in given["ids"])
        seeds = [zlib.crc32(text.encode()) for text in drawn_by]  # not hash(): the same in every process
        reference = reference_states(self.model, rows, *self.layers)[:, counted]

        def alignment(embeds: Tensor) -> Tensor:
            adapted = adapted_states(self.model, rows._replace(embeds=embeds), *self.layers)
            return torch.cosine_similarity(adapted[:, counted], reference, dim=-1).sum()

        return perturb_pictures(rows.embeds, place, rows.lengths, seeds, alignment, adversary)


def _of_counted(rows: Rows, adapted: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States of the tokens that count alone, and their mask: the others' highest states are not computed to the end."""
    if (counted := rows.counted) is None:
        return adapted, reference, rows.mask
    return adapted[:, counted], reference[:, counted], torch.ones_like(counted)


def _refuse_other_than_a_loss(value: Any, name: str, adapted: Tensor) -> None:
    """Refuse what a loss of a user's own returned that cannot be minimised; that it is not finite is seen later."""
    if not isinstance(value, Tensor):
        came = f"a {type(value).__name__}"
    elif value.dim():
        came = f"one of shape {tuple(value.shape)}"
    elif adapted.requires_grad and not value.requires_grad:
        came = "one without gradient: it was detached, or does not come from `adapted`"
    else:
        return
    raise UserError(f"the loss `{name}` must return one number as a tensor with gradient, it returned {came}.")
