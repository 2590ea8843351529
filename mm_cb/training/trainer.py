"""The trainer of representation rerouting: transformers' own, with another loss and a log line per step."""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from mm_cb.core.files import append_jsonl
from mm_cb.models import ChatModel, TokenRole
from mm_cb.training.adversary import Adversary, perturb_pictures
from mm_cb.training.batches import Pair, PairCollator, PairedExamples, split_batch
from mm_cb.training.hidden_states import (
    Rows,
    adapted_states,
    hidden_states,
    lay_out,
    reference_states,
    target_states,
    use_row_attention,
)
from mm_cb.training.losses import (
    RetainAverage,
    RetainLayers,
    length_loss,
    reroute_coeff,
    reroute_loss,
    retain_coeff,
    retain_loss,
    retain_positions,
)
from mm_cb.training.placement import first_adapted_block

logger = logging.getLogger(__name__)


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
    """

    alpha: float
    target_layers: tuple[int, ...]
    retain_layers: RetainLayers = "all"
    retain_average: RetainAverage = "tokens"
    adversary: Adversary | None = None
    keep_length: float = 0.0


class RRTrainer(Trainer):
    """Trains an adapter to turn circuit-breaker states away and leave retain states where they were.

    Each optimiser step takes a circuit-breaker and a retain batch of one modality. The reference is the same model with
    the adapter off. The schedule counts optimiser steps (``state.global_step`` of ``state.max_steps``), and losses are
    divided by what counts in all micro-batches and processes of a step, so that splitting a batch changes nothing.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Algorithm 1 and section 4.2.
    """

    def __init__(
        self,
        model: ChatModel,
        args: TrainingArguments,
        rerouting: Rerouting,
        dataset: PairedExamples,
        collator: PairCollator,
        *,
        tokens_per_pass: int = 4096,
        metrics: Path | None = None,
        held_out: Sequence[Pair] = (),
        held_out_steps: int = 10,
        **options: Any,
    ) -> None:
        """Train the adapter of ``model``.

        Args:
            model: A model with a trainable PEFT adapter; only hidden states are used, see `ChatModel.keep_blocks`.
            args: ``per_device_train_batch_size`` times accumulation times processes must be the dataset's batch size.
            rerouting: The loss.
            dataset: The rows of the run, in order.
            collator: Its partner.
            tokens_per_pass: Rows go through the model in parts of at most so many tokens, or one row. Memory grows with
                it; the gradients of the parts add up to those of the batch. Halved when the device is out of memory.
            metrics: A JSONL file that gets one line per optimiser step.
            held_out: Pairs never trained on, whose states are measured every ``held_out_steps`` steps and at the end.
            held_out_steps: How often.
            options: For transformers' trainer.
        """
        super().__init__(model=model.model, args=args, train_dataset=dataset, data_collator=collator, **options)
        self._encoder = model
        self._collator = collator
        self._order = SequentialSampler(dataset)
        self._rerouting = rerouting
        self._tokens_per_pass = tokens_per_pass
        self._metrics = metrics
        self._held_out, self._held_out_steps = list(held_out), held_out_steps
        self._step_losses = torch.zeros(3)
        self._modality = ""
        use_row_attention(model)
        self._first_block = first_adapted_block(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimiser step, and what its two losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.counts(batches)

    def counts(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """Counted positions (circuit breaker, retain) of all micro-batches and processes, shape ``(2,)``."""
        rows = [
            torch.stack(
                [
                    batch["circuit_breaker_mask"].sum(),
                    retain_positions(batch["retain_mask"], self._rerouting.retain_average),
                ]
            )
            for batch in batches
        ]
        total = torch.stack(rows).sum(0).to(self.args.device)
        return self.accelerator.reduce(total, "sum")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add a micro-batch's gradients, part by part; with the step's last one, average them over the processes."""
        counts = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else self.counts([inputs])
        losses = torch.zeros(4, device=self.args.device)
        while True:
            before = [None if p.grad is None else p.grad.clone() for p in self._trained()]
            try:
                for part in split_batch(inputs, self._tokens_per_pass):
                    loss, parts = self.compute_loss(model, part, return_outputs=True, num_items_in_batch=counts)
                    self.accelerator.backward(loss)
                    losses += torch.stack([loss, *parts.values()]).detach()
                break
            except torch.OutOfMemoryError:
                longest = max(int(inputs[name].attention_mask.sum(-1).max()) for name in ("circuit_breaker", "retain"))
                if self._tokens_per_pass <= longest:
                    raise
                self._tokens_per_pass = max(self._tokens_per_pass // 2, longest)
            logger.warning("Out of memory: going on with parts of at most %d tokens.", self._tokens_per_pass)
            for parameter, gradient in zip(self._trained(), before, strict=True):
                parameter.grad = gradient
            losses = torch.zeros_like(losses)
            torch.cuda.empty_cache()
        self._step_losses = self._step_losses.to(losses.device) + losses[1:]
        self._modality = inputs["modality"]
        if self.accelerator.sync_gradients and isinstance(model, DistributedDataParallel):
            # DDP averages gradients when its own forward was called; ours starts in the middle of the tower.
            for parameter in self._trained():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return losses[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A (part of a) batch's share of ``c_s (L_s + keep_length L_length) + c_r L_r``.

        Args:
            model: Not used: the passes do not go through the whole model.
            inputs: What the collator makes, or a part of it, of both sets or one.
            return_outputs: Whether to return ``(loss, {"reroute_loss": …, "retain_loss": …, "length_loss": …})``.
            num_items_in_batch: The step's `counts`; those of this batch alone if left out.

        Returns:
            The loss, scaled so that the gradients of all parts, averaged over processes, are those of the step.
        """
        counts = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else self.counts([inputs])
        alpha, step, total_steps = self._rerouting.alpha, self.state.global_step, max(self.state.max_steps, 1)
        zero = torch.zeros((), device=self.args.device)
        rerouted, length = self._reroute_losses(inputs, counts[0]) if "circuit_breaker" in inputs else (zero, zero)
        retained = self._retain_loss(inputs, counts[1]) if "retain" in inputs else zero
        turned = rerouted + self._rerouting.keep_length * length
        loss = reroute_coeff(step, total_steps, alpha) * turned + retain_coeff(step, total_steps, alpha) * retained
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, our counts are not
        parts = {"reroute_loss": rerouted, "retain_loss": retained, "length_loss": length}
        return (loss, parts) if return_outputs else loss

    def _reroute_losses(self, inputs: Mapping[str, Any], count: Tensor) -> tuple[Tensor, Tensor]:
        """L_s and the length loss (0 where it has no weight); circuit-breaker rows stop at the top target."""
        batch, rows = inputs["circuit_breaker"], self._rows(inputs, "circuit_breaker")
        if self._rerouting.adversary is not None and batch.pixel_values is not None:
            rows = rows._replace(embeds=self._attack(inputs, rows, self._rerouting.adversary))
        adapted, reference = target_states(self._encoder, rows, *self._layers())
        rerouted = reroute_loss(adapted, reference, rows.mask, count=count)
        if not self._rerouting.keep_length:
            return rerouted, torch.zeros_like(rerouted)
        return rerouted, length_loss(adapted, reference, rows.mask, count=count)

    def _attack(self, inputs: Mapping[str, Any], rows: Rows, adversary: Adversary) -> Tensor:
        """Embeddings under which the adapted states point where the reference ones of the clean pictures do again."""
        batch, counted = inputs["circuit_breaker"], rows.mask.bool()
        place = batch.roles[batch.attention_mask.bool()] == TokenRole.IMAGE
        drawn_by = (f"{self.args.seed} {self.state.global_step} {name}" for name in inputs["circuit_breaker_ids"])
        seeds = [zlib.crc32(text.encode()) for text in drawn_by]  # not hash(): the same in every process
        reference = reference_states(self._encoder, rows, *self._layers())[:, counted]

        def alignment(embeds: Tensor) -> Tensor:
            adapted = adapted_states(self._encoder, rows._replace(embeds=embeds), *self._layers())
            return torch.cosine_similarity(adapted[:, counted], reference, dim=-1).sum()

        return perturb_pictures(rows.embeds, place, rows.lengths, seeds, alignment, adversary)

    def _layers(self) -> tuple[int, tuple[int, ...]]:
        """The first block with LoRA, and the hidden states to reroute."""
        return self._first_block, self._rerouting.target_layers

    def _retain_loss(self, inputs: Mapping[str, Any], count: Tensor) -> Tensor:
        """L_r, one hidden state at a time; those below the adapter count, and are exact zeros."""
        options, first = self._rerouting, self._first_block
        chosen = (
            range(len(self._encoder.decoder_blocks) + 1) if options.retain_layers == "all" else options.target_layers
        )
        rows = self._rows(inputs, "retain")
        states = hidden_states(self._encoder, rows, first, max(chosen))
        distances = [
            retain_loss(adapted[None], reference[None], rows.mask, average=options.retain_average, count=count)
            for layer, (reference, adapted) in enumerate(zip(*states, strict=True), first + 1)
            if layer in chosen
        ]
        return torch.stack(distances).sum() / len(chosen)

    def _rows(self, inputs: Mapping[str, Any], name: str) -> Rows:
        return lay_out(self._encoder, inputs[name], inputs[f"{name}_mask"])

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._encoder.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def measure_held_out(self) -> dict[str, float]:
        """Cosine to the reference and norms of both, at the target layers, over the counted tokens of held-out rows."""
        sums = {name: torch.zeros(4) for name in Pair._fields}
        size = self.args.per_device_train_batch_size
        for modality in ("text", "multimodal"):
            pairs = [pair for pair in self._held_out if pair.circuit_breaker.modality == modality]
            for start in range(0, len(pairs), size):
                for part in split_batch(self._collator(pairs[start : start + size]), self._tokens_per_pass):
                    name = "retain" if "retain" in part else "circuit_breaker"
                    rows = self._rows(part, name)
                    states = target_states(self._encoder, rows, *self._layers())
                    adapted, reference = (side[:, rows.mask.bool()].float() for side in states)
                    values = [torch.cosine_similarity(adapted, reference, dim=-1), reference.norm(dim=-1)]
                    values += [adapted.norm(dim=-1), torch.ones_like(values[0])]
                    sums[name] += torch.stack(values).sum((1, 2)).cpu()
        return {
            f"held_out_{name}_{key}": value
            for name, total in sums.items()
            for key, value in zip(
                ("cosine", "norm_reference", "norm_adapted"), (total[:3] / total[3]).tolist(), strict=True
            )
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses and both weights to a step's line, and write it to the metrics file.

        Raises:
            FloatingPointError: If the gradient of the step was not finite.
        """
        if "grad_norm" in logs:
            step, total_steps, alpha = self.state.global_step - 1, self.state.max_steps, self._rerouting.alpha
            rerouted, retained, length = self.accelerator.reduce(self._step_losses, "sum").tolist()
            self._step_losses = torch.zeros(3)
            record = {
                "step": step,
                "modality": self._modality,
                "reroute_loss": rerouted,
                "retain_loss": retained,
                "length_loss": length,
                "reroute_coeff": reroute_coeff(step, total_steps, alpha),
                "retain_coeff": retain_coeff(step, total_steps, alpha),
                "grad_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
            }
            if self._held_out and (step % self._held_out_steps == 0 or step + 1 == total_steps):
                record |= self.measure_held_out()
            if not all(map(torch.isfinite, torch.tensor([rerouted, retained, length, logs["grad_norm"]]))):
                raise FloatingPointError(f"The losses and their gradient must be finite, got {record}.")
            logs |= {key: value for key, value in record.items() if key not in ("step", "modality")}
            if self._metrics is not None and self.is_world_process_zero():
                append_jsonl(self._metrics, record)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula counts one pass of a whole model."""
        return 0

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """In order: the dataset is the run."""
        return self._order
