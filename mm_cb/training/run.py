"""One training run from a recipe: load, place the adapter, train with checkpoints, write the adapter and its card."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory, file_errors, read_jsonl, read_run, write_jsonl, write_text
from mm_cb.data.examples import Example, PictureError, read_examples
from mm_cb.models import load_tower
from mm_cb.models.cache import model_folder
from mm_cb.models.fingerprint import check_weights, fingerprint
from mm_cb.training.adapter import add_adapter, save_adapter
from mm_cb.training.adversary import Adversary
from mm_cb.training.batches import PairCollator, PairedExamples, hold_out
from mm_cb.training.card import model_card
from mm_cb.training.checkpoints import KeepLastComplete, last_checkpoint
from mm_cb.training.left_out import note_unreadable, reasons
from mm_cb.training.plan import Plan, check_device, make_plan
from mm_cb.training.recompute import recompute_blocks
from mm_cb.training.trainer import Rerouting, RRTrainer

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress
    from mm_cb.data.sources import Source
    from mm_cb.training.config import Mixture, Recipe

_SKIPPING = (
    "`mm-cb data check` finds all such rows, and a mixture leaves them out and counts them: "
    "`data: {sources: [{name: FILE}], skip_missing_images: true}`."
)


def train(
    recipe: "Recipe", out: Path, examples: Sequence[Example] | None = None, progress: "Progress | None" = None
) -> Path:
    """Train a circuit breaker, or go on with the run that ``out`` holds.

    An interrupted run ends with the same adapter, byte for byte on a CPU, as one that was not.

    Args:
        recipe: What to do.
        out: The run's folder: new, empty, or this run's own. It gets ``adapter_model.safetensors``,
            ``adapter_config.json``, ``base.json``, ``README.md``, ``metrics.jsonl`` and ``run.json``.
        examples: Training data in place of the recipe's.
        progress: Shows steps and losses.

    Returns:
        ``out``, as the folder of a PEFT adapter.

    Raises:
        UserError: If the data, the model or the folder do not fit the recipe.
    """
    out = Path(out)
    main = int(os.environ.get("RANK", "0")) == 0
    with _one_after_another(recipe):
        hub.keep_to(out)
        if examples is None and not isinstance(recipe.data, str | list):
            examples = load_examples(recipe)  # now, because the run's record names the files of a mixture
        inputs = [*getattr(examples, "inputs", []), *_inputs(recipe)]
        run = RunDirectory(out, "train", recipe.model_dump(mode="json"), recipe.seed, inputs=inputs)
        if main:
            run.open()
        finished = run.finished if main else bool(read_run(out).get("ended"))
    try:
        if not finished:
            plan = make_plan(recipe)
            check_device(plan)
            with file_errors(out):
                _train(plan, out, load_examples(recipe) if examples is None else examples, progress, main)
            if main:
                run.finish()
        else:
            check_weights(out, recipe.model)
        if main:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    except BaseException:
        if main:
            run.abandon()  # unless something was made: a corrected command may then take the folder
        raise
    finally:
        run.close()
    return out


def load_examples(recipe: "Recipe") -> Sequence[Example]:
    """The training data that a recipe names.

    Raises:
        UserError: If a file or a data set is missing or broken, or ids repeat across files.
    """
    if isinstance(recipe.data, str) and (guest := embedded(recipe.data)):
        return guest.training_examples(recipe.seed)
    if isinstance(recipe.data, list):
        examples = [example for file in recipe.data for example in read_examples(Path(file))]
        if len({example.id for example in examples}) < len(examples):
            raise UserError(f"the ids of the training examples in {recipe.data} must all differ, some repeat.")
        for example in examples:
            for image in example.images:
                if isinstance(image, Path) and not image.is_file():
                    raise UserError(f"{example.place}: the picture `{image}` is not there; {_SKIPPING}")
        return examples
    assert not isinstance(recipe.data, str)
    sources = sources_of(recipe.data)
    from mm_cb.data import mixture

    return mixture.load_examples(sources, recipe.seed, skip_missing_images=recipe.data.skip_missing_images)


def absent_data(recipe: "Recipe") -> dict[str, str]:
    """Every file or data set that a recipe names → why it cannot be read here; empty if it can. No row is read.

    Raises:
        UserError: If one is named twice for the same set.
    """
    if isinstance(recipe.data, str):
        return {recipe.data: ""}
    if isinstance(recipe.data, list):
        return {file: "" if Path(file).is_file() else f"`{file}` is not there." for file in recipe.data}
    sources, found = sources_of(recipe.data), dict[str, str]()
    from mm_cb.data.mixture import refuse_repeated
    from mm_cb.data.sources import open_source

    refuse_repeated(sources)
    for source in sources:
        try:
            open_source(source)
            found.setdefault(source.name, "")
        except UserError as error:
            found[source.name] = str(error)
    return found


def sources_of(data: "Mixture") -> "list[Source]":
    """A mixture's data sets in the words of `mm_cb.data`."""
    from mm_cb.data.sources import Source

    fields = [source.model_dump() for source in data.sources]
    return [Source(**{**field, "images": field["images"] and Path(field["images"])}) for field in fields]


def _inputs(recipe: "Recipe") -> list[Path | hub.Repository]:
    """What decides the result by its content, beside a mixture: files, and the model's commit if it is on the hub."""
    inputs: list[Path | hub.Repository] = []
    if isinstance(recipe.data, list):
        inputs += [Path(file) for file in recipe.data]
    if guest := embedded(recipe.model):
        inputs += sorted(guest.weights.glob("*.safetensors"))
    model_folder(recipe.model)
    return inputs + hub.used(recipe.model)


def _train(plan: Plan, out: Path, examples: Sequence[Example], progress: "Progress | None", main: bool) -> None:
    recipe, options, breaker, lora = plan.recipe, plan.recipe.training, plan.recipe.circuit_breaker, plan.recipe.lora
    set_seed(recipe.seed)
    skip = getattr(recipe.data, "skip_missing_images", False)
    unreadable = note_unreadable(out) if skip else None
    among, held_out = hold_out(examples, options.held_out, recipe.seed, recipe.batches, unreadable)
    try:
        rows = PairedExamples(
            examples,
            steps=options.max_steps,
            batch_size=options.batch_size,
            batches=recipe.batches,
            seed=recipe.seed,
            among=among,
            on_unreadable=unreadable,
        )
    except ValueError as error:
        raise UserError(f"recipe `{recipe.name}`: {error}") from error
    base: Any = load_tower(
        recipe.model,
        plan.kept.blocks,
        device=_device(recipe),
        dtype=recipe.dtype,
        image_backend=recipe.image_backend,
        attention=recipe.attention,
        quantize=recipe.quantize,
        max_length=options.max_length,
    )
    model = add_adapter(base, plan.paths, plan.kept, r=lora.r, lora_alpha=lora.lora_alpha, dropout=lora.dropout)
    if options.recompute:
        recompute_blocks(model)
    base_weights = fingerprint(recipe.model)
    checkpoint = last_checkpoint(out / "checkpoints", base_weights, remove_torn=main)
    metrics = out / "metrics.jsonl"
    done = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if main and metrics.exists():
        write_jsonl(metrics, [record for record in read_jsonl(metrics) if record["step"] < done])
    trainer = RRTrainer(
        model,
        _arguments(recipe, out / "checkpoints"),
        Rerouting(
            breaker.alpha,
            tuple(breaker.target_layers),
            breaker.retain_layers,
            breaker.retain_average,
            Adversary(breaker.adversary.steps, breaker.adversary.radius) if breaker.adversary.steps else None,
            breaker.keep_length,
        ),
        rows,
        PairCollator(model, {"text": breaker.masks.text, "multimodal": breaker.masks.multimodal}),
        tokens_per_pass=options.tokens_per_pass,
        metrics=metrics,
        held_out=held_out,
        held_out_steps=options.held_out_steps,
        callbacks=[KeepLastComplete(out / "checkpoints", base_weights)],
    )
    trainer.remove_callback(PrinterCallback)
    if progress is not None and main:
        trainer.add_callback(_Show(progress.task(f"train {recipe.name}", total=options.max_steps, done=done)))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except PictureError as error:
        raise UserError(f"{error}; {_SKIPPING}") from error
    except FloatingPointError as error:
        raise UserError(
            f"training diverged; lower `training.learning_rate`, or use bfloat16 in place of float16. {error}"
        ) from error
    if main:
        save_adapter(model, plan.paths, out)
        fields = recipe.model_dump(mode="json")
        card = model_card(fields, examples, plan.paths, read_jsonl(metrics), reasons(examples, out))
        write_text(out / "README.md", card)


@contextmanager
def _one_after_another(recipe: "Recipe") -> Iterator[None]:
    """Under a launcher of several processes: the first process goes through the block before the others.

    Raises:
        UserError: If the batch cannot be split over the processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield
        return
    share = processes * recipe.training.gradient_accumulation_steps
    if recipe.training.batch_size % share:
        raise UserError(
            f"`training.batch_size` must be a multiple of processes x gradient_accumulation_steps, got "
            f"{recipe.training.batch_size} and {processes} x {recipe.training.gradient_accumulation_steps}."
        )
    with PartialState(cpu=recipe.device == "cpu").main_process_first():
        yield


def _device(recipe: "Recipe") -> str:
    """The recipe's device; of several processes on one machine, each has its own GPU."""
    return (
        f"cuda:{os.environ['LOCAL_RANK']}" if recipe.device == "cuda" and "LOCAL_RANK" in os.environ else recipe.device
    )


def _arguments(recipe: "Recipe", checkpoints: Path) -> TrainingArguments:
    """The recipe in transformers' words."""
    options = recipe.training
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size
        // options.gradient_accumulation_steps
        // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=recipe.device == "cpu",
        report_to=options.report_to or "none",
        disable_tqdm=True,
    )


class _Show(TrainerCallback):
    """Passes steps and losses on to a progress display."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "reroute_loss" in logs:
            note = f"reroute {logs['reroute_loss']:.3f}, retain {logs['retain_loss']:.3f}"
            if "held_out_retain_cosine" in logs:
                cosines = (logs[f"held_out_{name}_cosine"] for name in ("circuit_breaker", "retain"))
                note += ", held-out cosine " + " / ".join(f"{cosine:.3f}" for cosine in cosines)
            self._task.advance(note=note)
