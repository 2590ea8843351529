"""`RRTrainer`: a circuit breaker in ten lines of Python, on a `datasets.Dataset`; ``mm-cb train`` runs the same."""

import copy
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from mm_cb.core.environment import launched
from mm_cb.core.files import file_errors
from mm_cb.core.runs import read_jsonl, write_jsonl
from mm_cb.data.examples import Example, OnUnreadable, kinds_of
from mm_cb.data.records import Records, as_examples
from mm_cb.data.unknown import note_of_unknown
from mm_cb.models import ChatModel, TextModel, TokenRole, load_model, load_tower
from mm_cb.models.adapters import check_places, read_tensors
from mm_cb.models.chat import chat, render_chat
from mm_cb.models.families import load_processor, read_config, skeleton
from mm_cb.models.fingerprint import fingerprint
from mm_cb.models.loading import refuse_attention
from mm_cb.models.text import TextProcessor
from mm_cb.training.adapter import put_lora, save_adapter
from mm_cb.training.adversary import Adversary
from mm_cb.training.averaging import AverageOfLast
from mm_cb.training.batches import HELD_OUT, PairCollator, RowPair, drawn
from mm_cb.training.checkpoints import KeepLastComplete, last_checkpoint, refuse_changed, step_of
from mm_cb.training.lending import language_tower, lent
from mm_cb.training.loading import number_of_workers, refuse_cache
from mm_cb.training.lora import placed, recipe_lora
from mm_cb.training.objective import Rerouting
from mm_cb.training.openings import Openings
from mm_cb.training.outcome import DidNotTakeHold
from mm_cb.training.placement import check_targets
from mm_cb.training.precision import usual_torch
from mm_cb.training.recipes.config import Lora
from mm_cb.training.rr_config import RRConfig
from mm_cb.training.trainer import ReroutingTrainer

_OF_A_NAME = ("dtype", "quantize", "image_backend")


class RRTrainer(ReroutingTrainer):
    """Trains a LoRA adapter that turns circuit-breaker states away and leaves retain states where they were.

    Attributes:
        settings: What it was told to do.
        paths: The modules with LoRA.

    Example:
        >>> trainer = RRTrainer(
        ...     model="llava-hf/llava-v1.6-mistral-7b-hf",
        ...     args=RRConfig(output_dir="runs/rr", dtype="bfloat16"),
        ...     train_dataset=dataset,
        ...     peft_config=LoraConfig(r=16, layers_to_transform=[14, 15, 16]),
        ... )
        >>> trainer.train()
        >>> trainer.save_model("runs/rr/adapter")
    """

    def __init__(
        self,
        model: PreTrainedModel | ChatModel | str | Path,
        args: RRConfig,
        train_dataset: Any,
        processing_class: Any = None,
        peft_config: LoraConfig | None = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        on_unreadable: OnUnreadable | None = None,
    ) -> None:
        """Check everything, draw the order of rows, and put the adapter on.

        Args:
            model: A transformers model, one of ours, or a name or path, of which only what training needs is loaded. A
                loaded model keeps the adapter, and is whole again after `train`.
            args: What to do.
            train_dataset: A ``datasets.Dataset`` or list of dictionaries with ``messages``, ``set``
                (``circuit_breaker`` or ``retain``) and, where rows have pictures, ``images``; see
                `mm_cb.data.records.Records`.
            processing_class: The model's processor, or tokenizer; None = the one that lies with the model.
            peft_config: Rank and place of the LoRA, see `mm_cb.training.lora.placed`; None = the recipe's defaults.
            callbacks: For transformers' trainer.
            on_unreadable: Told of rows whose picture cannot be read, and the next of the order stands in for each; None
                = such a row is an error when its turn comes.

        Raises:
            TypeError: If an argument is of another kind.
            ValueError: If the data lacks a column, a set or a picture, or the LoRA lies outside the language tower.
            UserError: If a model that is given by name cannot be loaded, a folder cannot be made, flash attention is
                asked for and cannot be run, or a cache of pictures where there are none.
        """
        if not isinstance(args, RRConfig):
            raise TypeError(f"`args` must be an mm_cb.RRConfig, got {type(args).__name__}.")
        self.settings = args
        _make_folder(args.output_dir)
        with usual_torch():
            examples = as_examples(train_dataset)
            set_seed(args.seed)
            rows, held_out = drawn(examples, args, on_unreadable)
            _tell_fewer_held_out(args, held_out)
            _tell_left_out(args, examples)
            base = self._put_on(model, processing_class, recipe_lora(Lora()) if peft_config is None else peft_config)
            _tell_unknown(base, examples)
            attention = language_tower(base).config._attn_implementation
            self._base_weights = fingerprint(base.name) if base.name else ""
            super().__init__(
                base,
                _arguments(args),
                _rerouting(args),
                rows,
                PairCollator(
                    base,
                    args.masks.by_modality,
                    Openings.of(base, rows.drawn()) if args.shared_openings == "left_out" else None,
                    count_ends=args.answer_ends == "counted",
                ),
                tokens_per_pass=args.tokens_per_pass,
                metrics=args.output_dir / "metrics.jsonl",
                held_out=held_out,
                held_out_steps=args.held_out_steps,
                start_distance=args.start_distance,
                stop_at_cosine=args.stop_at_cosine,
                callbacks=[*_averaging(args), KeepLastComplete(_checkpoints(args), self._base_weights), *callbacks],
            )
            language_tower(base).config._attn_implementation = attention  # `train` changes it, and back

    def train(  # type: ignore[override]  # transformers' other options are for trials and evaluation
        self, resume_from_checkpoint: bool | str | Path | None = None
    ) -> Any:
        """Train to the end.

        As with transformers' trainer, what ``output_dir`` holds of another training is no error (``mm-cb train``
        refuses it): training begins anew, and overwrites its metrics and checkpoints.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True = the newest complete one in ``output_dir``, if there is
                any. The result is the same, byte for byte on a CPU, as without interruption, if the settings are; those
                of the optimiser, such as its learning rate, are always the checkpoint's.

        Returns:
            Transformers' ``TrainOutput``.

        Warns:
            DidNotTakeHold: If nothing was rerouted in the end, or what should be retained went, too.

        Raises:
            FloatingPointError: If the training diverged.
            UserError: If the checkpoint is none of this training's, or damaged.
        """
        checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str | Path) else None
        if resume_from_checkpoint is True:
            main = self.is_world_process_zero()
            checkpoint = last_checkpoint(_checkpoints(self.settings), self._base_weights, remove_torn=main)
        done = 0 if checkpoint is None else step_of(checkpoint)
        with usual_torch(), self._lent():
            if checkpoint is not None:  # transformers would go on with what it finds of it, and warn
                check_places(self._encoder.model, read_tensors(checkpoint), checkpoint)
                refuse_changed(checkpoint)
            self._forget(done)
            if not done:
                self.begin()
            set_seed(self.settings.seed)
            result = super().train(None if checkpoint is None else str(checkpoint))
        if self.ended and self.is_world_process_zero():
            warnings.warn(self.ended, DidNotTakeHold, stacklevel=2)
        return result

    def measure_start(self) -> dict[str, float]:
        """What a run would find before its first step, see `mm_cb.training.start.Start.measure`; nothing is trained."""
        with usual_torch(), self._lent():
            return self.begin()

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as a folder that ``PeftModel.from_pretrained`` loads on the whole model.

        Args:
            output_dir: Where; None = the settings' ``output_dir``.
            _internal_call: Transformers' own, for checkpoints.

        Warns:
            UserWarning: If nothing was trained yet.

        Raises:
            UserError: If it cannot be written there.
        """
        if _internal_call:
            super().save_model(None if output_dir is None else str(output_dir), _internal_call=True)
        elif self.is_world_process_zero():
            folder = Path(output_dir or self.settings.output_dir)
            _make_folder(folder)
            if not self.state.global_step:
                warnings.warn(
                    f"the adapter in `{folder}` is not trained: call `train()` before `save_model()`.", stacklevel=2
                )
            with file_errors(folder):
                save_adapter(self._encoder, self.paths, folder)

    def _lent(self) -> AbstractContextManager[None]:
        how = self.settings
        return lent(
            self._encoder, self._kept, recompute=how.recompute, attention=how.attention, pictures=how.picture_cache
        )

    def _put_on(self, model: Any, processing_class: Any, config: LoraConfig) -> ChatModel:
        """The model with a fresh adapter; of a name, no more is loaded than training needs."""
        args = self.settings
        named = isinstance(model, str | Path)
        whole = skeleton(read_config(model), str(model)) if named else _wrapped(model, processing_class, args)
        if args.retain == "kl" and not named and not _has_head(whole):
            raise ValueError(
                "`retain='kl'` compares logits, and the model that is given has no `lm_head`: load it with its head "
                "(...ForCausalLM, ...ForConditionalGeneration), or take `retain='l2'`."
            )
        dtype = args.dtype if named else str(whole.base.dtype).removeprefix("torch.")
        refuse_attention(args.attention, _device(args), dtype)
        if args.picture_cache is not None:
            refuse_cache(args.picture_cache, whole, args.batches)
            _make_folder(args.picture_cache)
        self.paths, blocks = placed(whole, config, args.target_layers)
        all_blocks = len(whole.decoder_blocks)
        self._kept = check_targets(args.target_layers, blocks, all_blocks, args.retain_layers, args.retain)
        if not named:
            return put_lora(whole, self.paths, config)
        how = {name: getattr(args, name) for name in _OF_A_NAME} | {"device": _device(args)}
        tower = load_model(model, **how) if self._kept.head else load_tower(model, self._kept.blocks, **how)
        tower.max_length = args.max_length
        if processing_class is not None:
            tower.processor = _processor(tower, processing_class)
        return put_lora(tower, self.paths, config)

    def _forget(self, done: int) -> None:
        """Leave of the metrics what came before step ``done``."""
        metrics = self.settings.output_dir / "metrics.jsonl"
        if self.is_world_process_zero() and metrics.exists():
            write_jsonl(metrics, [record for record in read_jsonl(metrics) if record["step"] < done])


def _has_head(model: ChatModel) -> bool:
    """Whether the model makes logits of its last hidden states."""
    head = getattr(model.base, "lm_head", None)
    return head is not None and not isinstance(head, nn.Identity)


def _make_folder(path: Path) -> None:
    with file_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def _wrapped(model: Any, processing_class: Any, args: RRConfig) -> ChatModel:
    """A loaded model in our words, with its processor."""
    given = model.model if isinstance(model, ChatModel) else model
    if isinstance(given, PeftModel):
        raise ValueError("`model` has an adapter already; give its base, `model.unload()`.")
    if not isinstance(given, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers model, a ChatModel, a name or a path, got {type(model).__name__}."
        )
    if told := [name for name in _OF_A_NAME if name in args.model_fields_set]:
        raise ValueError(f"`{told[0]}` is for a model given by name; this one is loaded already, leave it out.")
    name = model.name if isinstance(model, ChatModel) else str(given.name_or_path or "")
    shell = model if isinstance(model, ChatModel) else skeleton(given.config, name)
    processor = shell.processor
    if processing_class is not None:
        processor = _processor(shell, processing_class)
    elif processor is None:
        processor = load_processor(name, given.config)
    return type(shell)(given, processor, name, max_length=args.max_length)


def _processor(model: ChatModel, given: Any) -> Any:
    """The user's processor or tokenizer as the model's family takes it."""
    processor = given
    if isinstance(model, TextModel):
        processor = given if isinstance(given, TextProcessor) else TextProcessor(copy.deepcopy(given))
    elif not hasattr(given, "image_processor") or not hasattr(given, "tokenizer"):
        raise TypeError(f"`processing_class` must be the processor of a model that sees, got {type(given).__name__}.")
    answered = render_chat(processor, chat("a", completion="b"))
    end = str(processor.tokenizer.eos_token)
    if not any(answered.text[: span.end].endswith(end) for span in answered.spans if span.role == TokenRole.COMPLETION):
        warnings.warn(
            f"the chat template of `processing_class` does not end an answer with `{end}`, so that ends of answers do "
            "not count in the losses; leave `processing_class` out to take the model's own.",
            stacklevel=4,
        )
    return processor


def _tell_fewer_held_out(args: RRConfig, held_out: Sequence[RowPair]) -> None:
    """Say that rows are so few that fewer pairs than usual are held out, where nobody said how many."""
    usual = HELD_OUT * (2 if args.batches == "alternate" else 1)
    if args.held_out is None and len(held_out) < usual and launched("RANK", 0) == 0:
        unknown = "" if held_out else "; how the adapter fares on rows never trained on will be unknown"
        warnings.warn(
            f"few rows: pairs held out: {len(held_out)}, in place of {usual}{unknown} (`training.held_out`).",
            stacklevel=3,
        )


def _tell_left_out(args: RRConfig, examples: Sequence[Example]) -> None:
    """Say that rows of a kind which the batches do not hold are not trained on."""
    kind = {"text": "multimodal", "multimodal": "text"}.get(args.batches)
    left_out = sum(modality == kind for _, modality in kinds_of(examples))
    if left_out and launched("RANK", 0) == 0:
        what = "with pictures" if kind == "multimodal" else "without a picture"
        rows = f"{left_out} row{'s' if left_out > 1 else ''} {what}"
        warnings.warn(f"{rows}: not trained on (`batches` is `{args.batches}`).", stacklevel=3)


def _tell_unknown(model: ChatModel, examples: Sequence[Example]) -> None:
    """Say of rows in memory what reading a file says of its own: that the model does not know half of a text."""
    if isinstance(examples, Records) and launched("RANK", 0) == 0:
        if told := note_of_unknown(model.processor.tokenizer, examples.texts(), "rows", "train"):
            warnings.warn(f"{told}.", stacklevel=3)


def _checkpoints(args: RRConfig) -> Path:
    return args.output_dir / "checkpoints"


def _device(args: RRConfig) -> str:
    """The settings' device; of several processes on one machine, each has its own GPU."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _averaging(args: RRConfig) -> list[TrainerCallback]:
    """What comes before a checkpoint is sealed, where weights are averaged."""
    return [AverageOfLast(args.average_last, _checkpoints(args))] if args.average_last else []


def _rerouting(args: RRConfig) -> Rerouting:
    adversary = args.adversary
    return Rerouting(
        args.alpha,
        tuple(args.target_layers),
        args.retain_layers,
        args.retain_average,
        Adversary(adversary.steps, adversary.radius) if adversary.steps else None,
        args.keep_length,
        args.loss,
        args.loss_settings,
        args.retain_scale,
        args.schedule_steps,
        args.retain,
        args.dial_from,
    )


def _arguments(args: RRConfig) -> TrainingArguments:
    """The settings in transformers' words."""
    device = _device(args)
    return TrainingArguments(
        output_dir=str(_checkpoints(args)),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size // args.gradient_accumulation_steps // launched("WORLD_SIZE", 1),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=args.lr_scheduler_type,
        optim="adamw_torch",
        seed=args.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=args.save_steps,
        remove_unused_columns=False,
        dataloader_num_workers=number_of_workers(args.dataloader_num_workers, device),
        dataloader_pin_memory=device.startswith("cuda"),
        accelerator_config={"non_blocking": device.startswith("cuda")},
        use_cpu=device == "cpu",
        report_to=args.report_to or "none",
        disable_tqdm=True,
    )
