"""One training run from a recipe, in a folder of its own: goes on where it stopped, ends with adapter and card."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from mm_cb.core import hub
from mm_cb.core.environment import launched
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory, file_errors, read_jsonl, read_run, write_text
from mm_cb.data.examples import Example, PictureError
from mm_cb.models.adapters import read_settings, read_tensors
from mm_cb.models.cache import weight_files
from mm_cb.models.fingerprint import check_weights
from mm_cb.training.batches import MissingRows
from mm_cb.training.card import model_card
from mm_cb.training.inputs import SKIPPING, input_files, load_examples
from mm_cb.training.launch import warn_of_missing_processes
from mm_cb.training.loading import worker_lost
from mm_cb.training.lora import recipe_lora
from mm_cb.training.planning.left_out import note_unreadable, reasons
from mm_cb.training.planning.plan import TrainingPlan, check_device, make_plan
from mm_cb.training.planning.preflight import open_drawn
from mm_cb.training.recipes.recipe import deciding
from mm_cb.training.rr_config import RRConfig, config_of
from mm_cb.training.rr_trainer import RRTrainer

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress
    from mm_cb.training.recipes.config import Recipe


_SHORTER = "fewer training.max_steps, a smaller training.batch_size or training.max_length, or a GPU"


def train(
    recipe: "Recipe", out: str | Path, examples: Sequence[Example] | None = None, progress: "Progress | None" = None
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
    main = launched("RANK", 0) == 0
    with _one_after_another(recipe):
        hub.keep_to(out)
        if examples is None and not isinstance(recipe.data, str):
            examples = load_examples(recipe)  # now, because the run's record names the files
        inputs = [*getattr(examples, "inputs", []), *input_files(recipe)]
        run = RunDirectory(out, "train", deciding(recipe), recipe.seed, inputs=inputs)
        if main:
            run.open()
        finished = run.finished if main else bool(read_run(out).get("ended"))
    try:
        if not finished:
            plan = make_plan(recipe)
            check_device(plan)
            examples = load_examples(recipe) if examples is None else examples
            with file_errors(out):
                _train(plan, out, examples, progress, main)
            if main:
                run.finish(left_out=reasons(examples, out))
        else:
            read_settings(out)
            read_tensors(out)
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


def measure_start(plan: TrainingPlan) -> dict[str, float]:
    """How a recipe's run would start, on its own first rows; nothing is trained or kept.

    Returns:
        See `mm_cb.training.start.Start.measure`.

    Raises:
        UserError: If the weights, the data or the device are not on this machine.
    """
    recipe = plan.recipe
    if not weight_files(recipe.model):
        raise UserError(f"the weights of `{recipe.model}` are not on this machine.")
    check_device(plan)
    with TemporaryDirectory() as folder:
        settings = config_of(recipe, Path(folder)).model_copy(update={"picture_cache": None})
        return _trainer(recipe, settings, load_examples(recipe)).measure_start()


def _train(plan: TrainingPlan, out: Path, examples: Sequence[Example], progress: "Progress | None", main: bool) -> None:
    recipe = plan.recipe
    shown = [] if progress is None else [_Show(progress, f"train {recipe.name}")]
    settings = config_of(recipe, out)
    try:
        if main and not getattr(recipe.data, "skip_missing_images", False):
            open_drawn(examples, settings)
        trainer = _trainer(recipe, settings, examples, shown)
        if main:
            warn_of_missing_processes(os.environ, trainer.accelerator.num_processes)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=True)
    except MissingRows as error:
        raise UserError(f"recipe `{recipe.name}`: {error}") from error
    except PictureError as error:
        raise UserError(f"{str(error).rstrip('.')}. {SKIPPING}") from error
    except FloatingPointError as error:
        raise UserError(
            f"training diverged; lower `training.learning_rate`, or use bfloat16 in place of float16. {error}"
        ) from error
    except RuntimeError as error:
        if (lost := worker_lost(error)) is None:
            raise
        raise lost from error
    if main:
        trainer.save_model(out)
        fields, metrics = deciding(recipe), read_jsonl(out / "metrics.jsonl")
        write_text(out / "README.md", model_card(fields, examples, trainer.paths, metrics, reasons(examples, out)))


def _trainer(
    recipe: "Recipe", settings: RRConfig, examples: Sequence[Example], shown: Sequence[TrainerCallback] = ()
) -> RRTrainer:
    skip = getattr(recipe.data, "skip_missing_images", False)
    return RRTrainer(
        recipe.model,
        settings,
        examples,
        peft_config=recipe_lora(recipe.lora),
        callbacks=shown,
        on_unreadable=note_unreadable(settings.output_dir) if skip else None,
    )


@contextmanager
def _one_after_another(recipe: "Recipe") -> Iterator[None]:
    """Under a launcher of several processes: the first process goes through the block before the others.

    Raises:
        UserError: If the batch cannot be split over the processes.
    """
    processes = launched("WORLD_SIZE", 1)
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


class _Show(TrainerCallback):
    """Passes steps and losses on to a progress display."""

    def __init__(self, progress: "Progress", title: str) -> None:
        self._progress, self._title = progress, title
        self._task: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._task = self._progress.task(self._title, state.max_steps, done=state.global_step, shorter=_SHORTER)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._task is not None and logs and "reroute_loss" in logs:
            note = f"reroute {logs['reroute_loss']:.3f}, retain {logs['retain_loss']:.3f}"
            if "held_out_retain_cosine" in logs:
                turned, kept = (logs[f"held_out_{name}_cosine"] for name in ("circuit_breaker", "retain"))
                note += f"; held-out cosine {turned:.3f} (low is good), of retain rows {kept:.3f} (near 1 is)"
            self._task.advance(note=note)
