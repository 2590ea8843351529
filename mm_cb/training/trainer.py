"""The trainer of representation rerouting: transformers' own, with another loss and a log line per step."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mm_cb.core.files import append_jsonl
from mm_cb.data.examples import SETS
from mm_cb.models import ChatModel
from mm_cb.training.batches import Batch, PairCollator, PairedExamples, RowPair, split_batch
from mm_cb.training.hidden_states import use_row_attention
from mm_cb.training.loading import Prepared, batches_ahead
from mm_cb.training.losses import reroute_coeff, retain_coeff, retain_positions
from mm_cb.training.objective import Rerouting, TrainingObjective
from mm_cb.training.outcome import ENOUGH_STEPS, STUCK, Levers, outcome
from mm_cb.training.start import START_ROWS, FirstMeasurements, matrices_b

__all__ = ["Rerouting", "ReroutingTrainer"]

logger = logging.getLogger(__name__)


class ReroutingTrainer(Trainer):
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
        held_out: Sequence[RowPair] = (),
        held_out_steps: int = 10,
        start_distance: float = 0.0,
        stop_at_cosine: float | None = None,
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
            start_distance: See `begin`.
            stop_at_cosine: Stop when the cosine of held-out circuit-breaker rows is not above it; None = never.
            options: For transformers' trainer.
        """
        made: Any = collator  # of typed dictionaries, which transformers' own type does not know
        super().__init__(model=model.model, args=args, train_dataset=dataset, data_collator=made, **options)
        self._encoder = model
        self._collator = collator
        self._rows = dataset
        self._rerouting = rerouting
        self._tokens_per_pass = tokens_per_pass
        self._metrics = metrics
        self._held_out, self._held_out_steps = list(held_out), held_out_steps
        self._start_distance, self._stop_at = start_distance, stop_at_cosine
        self._start: dict[str, float] = {}
        self._warned = False
        self.ended: str | None = None
        """What is wrong with held-out rows at the end of the run; None where nothing is, or none are held out."""
        self._step_losses = torch.zeros(3)
        self._modality = ""
        use_row_attention(model)
        self._objective = TrainingObjective(model, rerouting, args.seed)

    def begin(self) -> dict[str, float]:
        """Put B where the run starts, and measure there; the first step's line in the metrics says it, too.

        Returns:
            See `mm_cb.training.start.Start.measure`.
        """
        firsts = self._rows.first_of_each_modality(min(START_ROWS, self.args.per_device_train_batch_size))
        start = FirstMeasurements(
            self._objective, [self._encoded(pairs) for pairs in firsts], self._tokens_per_pass, self.args.seed
        )
        self._start = start.measure(self._start_distance, self.args.learning_rate, self._agreed)
        return self._start

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Transformers' own; where B starts at a distance, with a learning rate of its own for it."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*arguments, **options)
        if made or not self._start_distance:
            return optimizer
        rate = self._start.get("start_b_rate", self.args.learning_rate)  # a resumed run takes its checkpoint's
        chosen = {id(weight) for weight in matrices_b(self._encoder.model)}
        for group in list(optimizer.param_groups):
            apart = [weight for weight in group["params"] if id(weight) in chosen]
            group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
            if apart:
                optimizer.add_param_group({**group, "params": apart, "lr": rate})
        return optimizer

    def _agreed(self, value: float) -> float:
        """The mean over the processes."""
        return float(self.accelerator.reduce(torch.tensor(value, device=self.args.device), "mean"))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimiser step, and what its two losses are divided by.

        Raises:
            UserError: If one of them could not be made.
        """
        made: list[Prepared] = super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        batches = list[Batch]()
        for one in made:
            for example, error in one.unreadable:
                assert self._rows.on_unreadable is not None
                self._rows.on_unreadable(example, error)
            if one.batch is None:
                raise one.error or AssertionError
            batches.append(one.batch)
        return batches, self.counts(batches)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The run's batches in its order, prepared by ``args.dataloader_num_workers`` processes."""
        args = self.args
        loader = batches_ahead(
            self._rows,
            self._collator,
            args.per_device_train_batch_size,
            workers=args.dataloader_num_workers,
            pin=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _encoded(self, pairs: Sequence[RowPair]) -> Batch:
        """Pairs as a batch on the model's device."""
        return send_to_device(self._collator(pairs), self._encoder.device)

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Counted positions (circuit breaker, retain) of all micro-batches and processes, shape ``(2,)``."""
        rows = [
            torch.stack(
                [
                    batch["circuit_breaker"]["mask"].sum(),
                    retain_positions(batch["retain"]["mask"], self._rerouting.retain_average),
                ]
            )
            for batch in batches
        ]
        total = torch.stack(rows).sum(0).to(self.args.device)
        return self.accelerator.reduce(total, "sum")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
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
                longest = max(max(inputs[name]["lengths"]) for name in SETS)
                if self._tokens_per_pass <= longest:
                    raise
                self._tokens_per_pass = max(self._tokens_per_pass // 2, longest)
            told = "Out of memory: going on with parts of at most %d tokens."
            if self._objective.loss.among_tokens:
                told += (
                    f" `{self._objective.loss.name}` compares the tokens of a part: it is another loss from here on."
                )
            logger.warning(told, self._tokens_per_pass)
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
        inputs: Any,
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
        alpha, step, total_steps = self._rerouting.alpha, self.state.global_step, self._schedule_steps()
        rerouted = length = retained = torch.zeros((), device=self.args.device)
        if "circuit_breaker" in inputs:
            rerouted, length = self._objective.reroute(inputs["circuit_breaker"], counts[0], step)
        if "retain" in inputs:
            retained = self._objective.retain(inputs["retain"], counts[1])
        turned = rerouted + self._rerouting.keep_length * length
        loss = reroute_coeff(step, total_steps, alpha) * turned + retain_coeff(step, total_steps, alpha) * retained
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, our counts are not
        parts = {"reroute_loss": rerouted, "retain_loss": retained, "length_loss": length}
        return (loss, parts) if return_outputs else loss

    def _schedule_steps(self) -> int:
        return self._rerouting.schedule_steps or max(self.state.max_steps, 1)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._encoder.model.parameters() if parameter.requires_grad]

    def measure_held_out(self, step: int = 0) -> dict[str, float]:
        """What `Objective.measure` finds over the counted tokens of held-out rows."""
        size = self.args.per_device_train_batch_size
        pairs = [[p for p in self._held_out if p.circuit_breaker.modality == kind] for kind in ("text", "multimodal")]
        batches = (self._encoded(some[at : at + size]) for some in pairs for at in range(0, len(some), size))
        parts = (part for batch in batches for part in split_batch(batch, self._tokens_per_pass))
        return self._objective.measure(parts, step)

    def _judged(self, record: dict[str, Any]) -> dict[str, str]:
        """Look at a measurement of held-out rows: warn, stop, or say of the last one how the run ended."""
        step, steps = record["step"], self.state.max_steps
        stop = self._stop_at is not None and record["held_out_circuit_breaker_cosine"] <= self._stop_at
        self.control.should_training_stop |= stop
        if stop or step + 1 == steps:
            self.ended = outcome(self._objective.loss, record, self._levers())
            return {STUCK: self.ended} if self.ended else {}
        late = steps >= ENOUGH_STEPS and (step + 1) * 5 >= steps and not self._warned
        if late and (found := outcome(self._objective.loss, record, self._levers())):
            self._warned = True
            if self.is_world_process_zero():
                warnings.warn(f"{found} (no end yet, {steps - step - 1} steps are to come).", stacklevel=2)
        return {}

    def _levers(self) -> Levers:
        rerouting = self._rerouting
        return Levers(
            rerouting.retain_scale,
            self._start_distance,
            self._schedule_steps(),
            self.state.max_steps,
            self.args.learning_rate,
            self._collator.openings is None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses and both weights to a step's line, and write it to the metrics file.

        Raises:
            FloatingPointError: If the gradient of the step was not finite.
        """
        if "grad_norm" in logs:
            step, total_steps, alpha = self.state.global_step - 1, self._schedule_steps(), self._rerouting.alpha
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
            } | (self._start if step == 0 else {})
            if self._held_out and (step % self._held_out_steps == 0 or step + 1 == self.state.max_steps):
                record |= self.measure_held_out(step)
                record |= self._judged(record)
            if not all(map(torch.isfinite, torch.tensor([rerouted, retained, length, logs["grad_norm"]]))):
                raise FloatingPointError(f"The losses and their gradient must be finite, got {record}.")
            logs |= {key: value for key, value in record.items() if key not in ("step", "modality")}
            if self._metrics is not None and self.is_world_process_zero():
                append_jsonl(self._metrics, record)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula counts one pass of a whole model."""
        return 0
