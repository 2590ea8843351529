"""The fields of a recipe and of `RRConfig`: what each means, what may stand there, and what the paper says."""

import re
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mm_cb.core.devices import refuse_unknown
from mm_cb.core.embedded import embedded, guest_names
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS, plain
from mm_cb.training.registry import check_combination, full_settings, loss_entry

_WHOLE = re.compile("[-+]?[0-9]{1,99}")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
Mask = Literal["after_image", "user_and_assistant", "completion", "tool_call", "all"]


class Within(GroupedMetadata):
    """A number's `LIMITS` as pydantic reads them: refused with the reason, and in the schema for the list of fields."""

    def __init__(self, setting: str) -> None:
        """Take the limit of a setting."""
        self._limit = LIMITS[setting]

    def __iter__(self) -> Iterator[Any]:
        limit = self._limit
        yield Gt(limit.least) if limit.above else Ge(limit.least)
        yield Le(limit.most)
        yield BeforeValidator(self._refuse)

    def _refuse(self, value: Any) -> Any:
        """What another library has as a number is pydantic's to read or to refuse."""
        number = plain_number(value, whole=self._limit.whole)
        known = number is None or isinstance(number, int | float | Sized)
        if known and not self._limit.holds(number):
            raise ValueError(f"a {self._limit.text} is expected ({self._limit.why})")
        return number


def plain_number(value: Any, *, whole: bool = False) -> Any:
    """The number in a text that YAML takes for none, such as ``1e30``; other values as they are, to be checked next.

    Texts that only Python or pydantic takes for numbers (``1_0``, digits of other scripts) are none.
    """
    if not isinstance(value, str):
        return plain(value)
    if not (_WHOLE if whole else _NUMBER).fullmatch(value):
        return value
    return int(value) if whole else float(value)


def _number(value: Any) -> Any:
    number = plain_number(value)
    if isinstance(number, str | bytes):
        raise ValueError("a number is expected")
    return number


def _written_out(path: Any) -> Any:
    if not str(path).strip() or str(path).startswith("~"):
        raise ValueError("a path is expected, without `~`")
    return path


Block = Annotated[int, Within("block")]
Layer = Annotated[int, Within("layer")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            words = f", but one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""
            raise ValueError(f"neither true nor false can stand here{words} (YAML reads yes, no, on and off as these)")
        return value


class Masks(_Section):
    """Which tokens count in the losses, for both sets."""

    multimodal: Mask = "after_image"
    """Rows with a picture (paper: after_image)."""
    text: Mask = "user_and_assistant"
    """Rows without (paper: user_and_assistant)."""

    @property
    def by_modality(self) -> dict[Literal["text", "multimodal"], Mask]:
        """The mask of rows of each modality."""
        return {"text": self.text, "multimodal": self.multimodal}


class LatentAdversary(_Section):
    """Changes the pictures' embeddings of circuit-breaker rows so that they undo the rerouting (not in the paper)."""

    steps: Annotated[int, Within("adversary_steps")] = 0
    """Sign-gradient steps per batch; 0 = no adversary (paper)."""
    radius: Annotated[float, Within("radius")] = 1.0
    """Largest change of an entry, in root mean squares of the pictures' embeddings; each row's own lies below."""


class CircuitBreaker(_Section):
    """The losses and their schedule."""

    loss: str = "rr"
    """What is done to circuit-breaker states: rr (paper), rand_p, rand_c, rmu (ablation), triplet, repbend, yours.

    In mm_cb/training/losses.py (rr: reroute_loss, else NAME_loss), the last two in contrast.py.
    """
    loss_settings: Annotated[dict[str, Any], Field(validate_default=True)] = {}
    """Settings of the loss, by name; those of the losses we ship are listed below."""
    alpha: Annotated[float, Within("alpha")] = 5.0
    """Sum of both loss weights (paper: 5 for LLaVA-NeXT-Mistral-7B)."""
    target_layers: Annotated[list[Layer], Field(min_length=1)] = [16]
    """Hidden states to reroute: 0 = embeddings, k = output of 0-based block k - 1 (paper: 16)."""
    retain: Literal["l2", "kl"] = "l2"
    """What is kept of retain rows: hidden states (paper: l2), or what is said after each token (kl).

    kl reads the logits: the whole model is loaded and run, and retain_layers and retain_scale are not read.
    """
    retain_layers: Literal["all", "targets"] = "all"
    """Hidden states that the retain loss averages over: all kept ones, embeddings included, or the targets."""
    retain_average: Literal["tokens", "official"] = "tokens"
    """Divide the retain loss by counted tokens (paper), or by 1024 for every row (released trainer, its padding)."""
    retain_scale: Literal["absolute", "relative"] = "relative"
    """Retain distances as they are (paper: absolute), or as parts of the states' length: no length of states is stuck.
    """
    schedule_steps: Annotated[int, Within("schedule_steps")] | None = None
    """Steps T that the loss weights are spread over; null = max_steps (paper).

    More of them keep the retain loss light for longer; behind fewer both losses weigh the same.
    """
    masks: Masks = Masks()
    shared_openings: Literal["left_out", "rerouted"] = "left_out"
    """First tokens of a circuit-breaker row that a retain row has, too: not rerouted, or pulled both ways (paper)."""
    answer_ends: Literal["counted", "left_out"] = "counted"
    """The token that ends an answer of a circuit-breaker row; left out, it is as if it were not there (trainer)."""
    keep_length: Annotated[float, Within("keep_length")] = 0.0
    """Weight, in the reroute loss, of a term that keeps rerouted states as long as they were; 0 = none (paper)."""
    dial_from: Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)] = 1.0
    """Two steps in four reroute with the adapter at a share drawn from this to 1, against attacks that dial it up.

    1 = never (paper). Ours.
    """
    adversary: LatentAdversary = LatentAdversary()

    @field_validator("loss")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            return loss_entry(name).name
        except UserError as error:
            raise ValueError(str(error)) from error

    @field_validator("loss_settings")
    @classmethod
    def _are_known(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, float]:
        if "loss" not in info.data:
            return given  # said already
        try:
            return full_settings(info.data["loss"], given)
        except UserError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        check_combination(self.loss, keep_length=self.keep_length, adversary_steps=self.adversary.steps)
        for name in ("retain_layers", "retain_scale") if self.retain == "kl" else ():
            expected, given = CircuitBreaker.model_fields[name].default, getattr(self, name)
            if given != expected:
                raise ValueError(
                    f"`retain: kl` looks at logits and does not read `{name}`: set it to {expected}, its default"
                )
        return self


class Lora(_Section):
    """The adapter."""

    layers_to_transform: Annotated[list[Block], Field(min_length=1)] = [14, 15, 16]
    """0-based decoder blocks of the language tower that get LoRA (paper: 14-16)."""
    modules: Annotated[list[str], Field(min_length=1)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    """Linear layers of these blocks (released trainer: all)."""
    r: Annotated[int, Within("r")] = 16
    """Rank (released trainer: 16)."""
    lora_alpha: Annotated[int, Within("lora_alpha")] = 16
    """The adapter's output is scaled by lora_alpha / r (released trainer: 16)."""
    dropout: Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)] = 0.05
    """Dropout on the adapter's input (released trainer: 0.05)."""


class DataSource(_Section):
    """One data set of a mixture; see ``mm-cb data list``."""

    name: Annotated[str, Field(min_length=1)]
    """A data set's name, a file or folder, or ``hub:ORG/NAME@SPLIT``."""
    weight: Annotated[float, Within("weight")] = 1.0
    """How often every row comes in one pass over the mixture; of a fraction, a seeded sample."""
    set: Literal["circuit_breaker", "retain"] | None = None
    """Which set the rows belong to; null = what the data set is for."""
    images: str | None = None
    """Folder of the pictures, for data that only names them."""
    limit: Annotated[int, Within("rows")] | None = None
    """Use a seeded sample of so many rows."""
    remove_request: Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)] = 0.0
    """Share of the rows whose request is emptied (released Llama-3 recipe: 0.5)."""
    refusals: bool = False
    """Also keep refusals, for models that already refuse (XSTest)."""


class MixtureConfig(_Section):
    """Data sets of one run."""

    sources: Annotated[list[DataSource], Field(min_length=1)]
    """What is mixed."""
    skip_missing_images: bool = False
    """Leave rows out whose picture is not there or, found in training, cannot be read; count them instead of stopping.
    """
    skip_too_long: bool = False
    """Leave rows out of which ``max_length`` cuts a picture off, or all that counts; count them instead of stopping."""


def _kind(data: Any) -> str:
    return (
        "mixture" if isinstance(data, dict | MixtureConfig) else "files" if isinstance(data, list | tuple) else "name"
    )


def _known(name: str) -> str:
    if embedded(name) is None:
        raise ValueError(f"expected {guest_names()}, a list of files (`data=[FILE]`), or `sources:` of a mixture")
    return name


Data = Annotated[
    Annotated[str, AfterValidator(_known), Tag("name")]
    | Annotated[list[str], Tag("files")]
    | Annotated[MixtureConfig, Tag("mixture")],
    Discriminator(_kind),
]


class Training(_Section):
    """The optimisation."""

    max_steps: Annotated[int, Within("max_steps")] = 150
    """Optimiser steps T (released trainer: 150)."""
    batch_size: Annotated[int, Within("batch_size")] = 16
    """Rows of each set per optimiser step, over all its micro-batches (released trainer: 16)."""
    gradient_accumulation_steps: Annotated[int, Within("micro_batches")] = 1
    """Micro-batches that an optimiser step is split into; changes memory and time, not the mathematics.

    Not so of triplet and repbend, as with tokens_per_pass.
    """
    tokens_per_pass: Annotated[int, Within("tokens_per_pass")] = 4096
    """Rows go through the model in parts of at most so many tokens, or one longer row: memory, not the mathematics.

    Not so of triplet and repbend, which compare the tokens of a part with each other.
    """
    recompute: bool = False
    """Run adapted blocks again in the backward pass instead of storing what is in them: memory for time, same bits."""
    max_length: Annotated[int, Within("max_length")] = 1024
    """Longer rows are cut to so many tokens, image tokens not counted (released trainer: 1024)."""
    learning_rate: Annotated[float, Within("learning_rate")] = 1e-4
    """AdamW's, at the first step (released trainer: 1e-4)."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on: as it is (released trainer), or falling, to 0 behind the last step."""
    weight_decay: Annotated[float, Within("weight_decay")] = 0.0
    """AdamW's (released trainer: 0)."""
    max_grad_norm: Annotated[float, Within("max_grad_norm")] = 1.0
    """Gradients are clipped to this norm; 0 = never (released trainer: 1, the default of transformers)."""
    average_last: Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)] = 0.0
    """The adapter is the mean of its weights over this last share of the steps; 0 = those of the last step (paper)."""
    save_steps: Annotated[int, Within("every")] = 25
    """A checkpoint every so many steps."""
    start_distance: Annotated[float, Within("start_distance")] = 0.15
    """How far a random B moves target states before the first step, in parts of their length; 0 = B is 0 (paper).

    B then has a learning rate of its own: a first step moves them by 200 times `learning_rate`, in such parts.
    """
    held_out: Annotated[int, Within("held_out")] | None = None
    """Pairs of each modality set aside, with every copy of their rows never trained on; cosine and norm are logged.

    At most half of the rows; null = 8, or that half where it is less; 0 = none.
    """
    held_out_steps: Annotated[int, Within("every")] = 10
    """How often they are measured."""
    stop_at_cosine: Annotated[float, Field(ge=-1, lt=1), BeforeValidator(_number)] | None = None
    """Stop when the cosine of held-out circuit-breaker rows is not above it; null = never (paper)."""
    dataloader_num_workers: Annotated[int, Within("workers")] | None = None
    """Processes that prepare pictures ahead of the steps, for each GPU: time, not the mathematics; 0 = none.

    null = none on a CPU, else 4 or what cores and shared memory allow.
    """
    picture_cache: Annotated[Path, BeforeValidator(_written_out)] | None = None
    """Folder of prepared pictures that runs share: time and disk, not the mathematics; null = kept nowhere."""
    report_to: list[str] = []
    """Trackers of transformers (``tensorboard``, ``wandb``, ``trackio``, ...); ``metrics.jsonl`` is always written."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"`batch_size` must be a multiple of `gradient_accumulation_steps`, got {self.batch_size} and "
                f"{self.gradient_accumulation_steps}"
            )
        if self.stop_at_cosine is not None and self.held_out == 0:
            raise ValueError("`stop_at_cosine` needs rows to measure, set `held_out` to 1 or more, got 0")
        if self.stop_at_cosine is not None and self.average_last:
            raise ValueError(
                "`stop_at_cosine` looks at the weights of a step, `average_last` keeps the mean of many: set one to "
                f"null or 0, got {self.stop_at_cosine:g} and {self.average_last:g}"
            )
        return self


def check_dial(dial_from: float, recompute: bool) -> None:
    """Make sure that a pass is computed as it was.

    Raises:
        ValueError: If blocks would be run again with another share of the adapter than they were run with.
    """
    if dial_from < 1 and recompute:
        raise ValueError(f"`dial_from` must be 1 where `recompute` is true, got {dial_from}")


class _Named(_Section):
    name: Annotated[str, Field(min_length=1)]
    """What the run is called in the model card."""
    model: Annotated[str, Field(min_length=1)]
    """An embedded model's name, a local folder, or a hub id, perhaps ``ORG/NAME@REVISION`` (branch, tag, commit)."""
    data: Data
    """An embedded model's name for its own data, JSONL files of training examples, or a mixture of data sets."""


class Machine(_Section):
    """What the run is on."""

    batches: Literal["alternate", "text", "multimodal"] = "alternate"
    """Text and multimodal batches in turn, step by step (paper), or one of them only."""
    seed: Annotated[int, Within("seed")] = 0
    """Decides the order of rows, the adapter's start, its dropout and what a loss draws."""
    device: str = "cpu"
    """Torch device; ``auto`` spreads the model over all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers of the model."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """How the language tower attends, within each row and without padding: row by row, or all rows in one call.

    The latter needs a GPU, bfloat16 or float16, and the flash-attn package; where a picture's tokens see those behind
    them (Gemma), or heads are larger than 256, it is sdpa. It has not been run on a GPU yet.
    """
    quantize: Literal["4bit"] | None = None
    """Weights of the decoder blocks in NF4 (bitsandbytes); image tower and projector stay as they are."""
    image_backend: Literal["pil", "torchvision"] = "pil"
    """Which image processor resizes the pictures."""

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, given: str) -> str:
        try:
            refuse_unknown(given)
        except UserError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return given


class Recipe(Machine, _Named):
    """One training run."""

    circuit_breaker: CircuitBreaker = CircuitBreaker()
    lora: Lora = Lora()
    training: Training = Training()

    @model_validator(mode="after")
    def _dial_holds(self) -> Self:
        check_dial(self.circuit_breaker.dial_from, self.training.recompute)
        return self
