"""A quick look at a model: its family, what can be done with it here, and the memory; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mm_cb.attacks.memory import estimate_attack
from mm_cb.attacks.registry import attacks
from mm_cb.core import provenance
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.recipe_files import recipe_model, recipe_names
from mm_cb.core.sizes import told_size
from mm_cb.models.cache import absent_files, model_folder, weight_files
from mm_cb.models.families import has_tokenizer, load_processor, read_config, skeleton
from mm_cb.models.known import known_config
from mm_cb.models.registry import family_of
from mm_cb.models.text import PLAIN_TEMPLATE
from mm_cb.models.vision import VisionModel
from mm_cb.training.placement import check_targets, linear_names, lora_paths
from mm_cb.training.planning.memory import estimate
from mm_cb.training.planning.plan import make_plan
from mm_cb.training.recipes.recipe import load_recipe

if TYPE_CHECKING:
    from mm_cb.models import ChatModel

_TOKENS, _LONGEST, _RANK = 4096, 1024, 16
"""Of a training pass, of the longest text of a row, of the adapter: as in the shipped recipes."""
USUAL = 1024
"""Tokens of a picture that is no poster: some families show 12 million pixels of one that has them."""


class ModelPlace(NamedTuple):
    """Where the model would run."""

    name: str
    dtype: str
    free: float


class Look(NamedTuple):
    """What a quick look gives."""

    rows: list[tuple[str, bool | None, str]]
    """What was looked at, whether it is fine (None = it is not here, or not for this model), and what was seen."""
    train: list[str]
    """The command that trains a breaker for it, behind ``mm-cb``; ``rows.jsonl`` are the user's rows."""


def look(name: str) -> Look:
    """Look at a model's configuration.

    Raises:
        UserError: If the configuration is not to be had, or no family here has models of its type; names it.
    """
    model, published = shape_of(name)
    rows = list(_rows(model, name, published))
    fits = next(fine for what, fine, _ in rows if what == "memory to train")
    return Look(rows, _training_words(model, name, by_cpu=bool(fits) and not torch.cuda.is_available()))


def _rows(model: ChatModel, name: str, published: bool) -> Iterator[tuple[str, bool | None, str]]:
    place = _place()
    sees, blocks = isinstance(model, VisionModel), len(model.decoder_blocks)
    count = sum(parameter.numel() for parameter in model.base.parameters())
    kind = "sees pictures" if sees else "text alone"
    if not sees and model.processor is not None and model.processor.tokenizer.chat_template == PLAIN_TEMPLATE:
        kind += ", no chat template (asked as `User: ...`, `Assistant: ...`)"
    family = type(model).__name__.removesuffix("Model") if sees else "text model"
    yield "family", True, f"{family} ({model.base.config.model_type}), {kind}; {_count(count)} parameters"
    absent = absent_files(name)
    where = "the published shape is used, its configuration is not here" if published else "configuration is here"
    if absent:
        yield "weights", None, f"not here: {', '.join(absent[:3])}; {where}"
    else:
        yield "weights", *_whole(name)
    if model.processor is None and not published and (why := _why_no_processor(name)):
        yield "processor", False, why
    recipe, fits = _recipe_for(model, name)
    yield (
        "train",
        True,
        f"LoRA in the {blocks} decoder blocks; recipe {recipe}{'' if fits else ', with layers of its own'}",
    )
    possible = [entry.name for entry in attacks() if not entry.needs_picture]
    yield "attack", True, "by pictures and texts" if sees else f"by texts alone: {', '.join(possible)}"
    yield "eval", True, "all benchmarks" if sees else "benchmarks without pictures: over-refusal of texts"
    yield "merge", True, "an adapter into a plain checkpoint"
    yield "memory to train", *_training(model, name, place)
    if sees:
        yield "memory to attack", *_attacking(model, place)


def _whole(name: str) -> tuple[bool, str]:
    try:
        weight_files(name)
    except UserError as error:
        return False, str(error)
    return True, "here"


def _why_no_processor(name: str) -> str | None:
    """Why no command would take the processor that is here; None where there is none, to plan without."""
    if has_tokenizer(model_folder(name)):
        try:
            load_processor(name, read_config(name))
        except UserError as error:
            return str(error)
    return None


def shape_of(name: str) -> tuple[ChatModel, bool]:
    """A model as shapes alone, and whether its published shape stands for the configuration that is not here.

    Raises:
        UserError: As `look`.
    """
    try:
        model_folder(name)
    except UserError:
        config = known_config(name)
        if config is None:
            raise
        return skeleton(config, name), True
    config = read_config(name)
    shape = skeleton(config, name)
    try:
        shape.processor = load_processor(name, config)  # which may limit pictures
    except UserError:
        shape.processor = None
    return shape, False


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _place() -> ModelPlace:
    if torch.cuda.is_available():
        return ModelPlace(torch.cuda.get_device_name(0), "bfloat16", float(torch.cuda.mem_get_info(0)[0]))
    return ModelPlace("this machine, no GPU", "float32", float(provenance.available_memory_bytes()))


def _training(model: ChatModel, name: str, place: ModelPlace) -> tuple[bool, str]:
    """By the shipped recipe for the model; else as those place adapter and targets, by depth."""
    recipe = next((one for one in recipe_names() if recipe_model(one) == name), None)
    if recipe:
        needed = [make_plan(load_recipe(recipe, [f"dtype={t}"])).memory().total for t in (place.dtype, "bfloat16")]
    else:
        needed = [_generic(model, dtype) for dtype in (place.dtype, "bfloat16")]
    return _verdict(needed[0], place, _in_bfloat16(needed[1], place))


def _generic(model: ChatModel, dtype: str) -> float:
    """Bytes with adapter and targets as deep as in the shipped recipes."""
    n = len(model.decoder_blocks)
    targets, blocks = _layers(model)
    paths = lora_paths(model, blocks, linear_names(model, blocks))
    kept = check_targets(targets, blocks, n, "all")
    tokens = max(_TOKENS, _LONGEST + model.largest_picture())
    return estimate(model, paths, kept, r=_RANK, dtype=dtype, tokens=tokens).total


def _layers(model: ChatModel) -> tuple[list[int], list[int]]:
    """Targets and blocks with LoRA: the middle of a model that sees, a third and two thirds of one of text."""
    n = len(model.decoder_blocks)
    if isinstance(model, VisionModel):
        return [max(1, n // 2)], list(range(max(0, n // 2 - 2), min(n, n // 2 + 1)))
    targets = sorted({max(1, 10 * n // 32), max(1, 20 * n // 32)})
    return targets, list(range(min(n, max(targets) + 1)))


def _recipe_for(model: ChatModel, name: str) -> tuple[str, bool]:
    """The shipped recipe of the model, else of its type, else of a model like it; and whether its layers fit."""
    named = {recipe: recipe_model(recipe) for recipe in recipe_names()}
    if own := next((recipe for recipe, its in named.items() if its == name), None):
        return own, True
    shapes = {recipe: known_config(its) for recipe, its in named.items()}
    kind, blocks = (type(model), model.base.config.model_type), len(model.decoder_blocks)
    alike = {
        recipe: shape for recipe, shape in shapes.items() if shape and (family_of(shape), shape.model_type) == kind
    }
    same = {recipe: _depth(shape) == blocks for recipe, shape in alike.items()}
    if same:
        return max(same.items(), key=lambda one: one[1])
    return ("llava-next-mistral-7b" if isinstance(model, VisionModel) else "mistral-7b-instruct"), False


def _depth(config: Any) -> int:
    return config.get_text_config().num_hidden_layers


def _training_words(model: ChatModel, name: str, *, by_cpu: bool) -> list[str]:
    """The recipe with this model, rows of the user, and what a CPU differs in from the recipe's own machine."""
    if embedded(name):
        return ["train", next(recipe for recipe in recipe_names() if recipe_model(recipe) == name), "--out", "runs/rr"]
    recipe, fits = _recipe_for(model, name)
    words = ["train", recipe, f"model={name}", "data=[rows.jsonl]"]
    if not fits:
        targets, blocks = (",".join(map(str, numbers)) for numbers in _layers(model))
        words += [f"circuit_breaker.target_layers=[{targets}]", f"lora.layers_to_transform=[{blocks}]"]
    if by_cpu:
        words += ["device=cpu", "dtype=float32"]
    return [*words, "--out", "runs/rr"]


def _attacking(model: ChatModel, place: ModelPlace) -> tuple[bool, str]:
    found = estimate_attack(model, place.dtype)
    half, largest = estimate_attack(model, "bfloat16"), model.largest_picture()
    more = f", with a picture of {largest:,} tokens, its largest, and {told_size(found.each)} for each further one"
    more += f" of --batch{_in_bfloat16(half.fixed + half.each, place)}"
    if largest > USUAL:
        usual = estimate_attack(model, "bfloat16", USUAL)
        more += f"; about {told_size(usual.fixed + usual.each)} with one of {USUAL:,}"
    return _verdict(found.fixed + found.each, place, more)


def _verdict(needed: float, place: ModelPlace, more: str) -> tuple[bool, str]:
    fits = needed <= place.free
    return fits, (f"about {told_size(needed)} in {place.dtype}, {told_size(place.free)} are free ({place.name}){more}")


def _in_bfloat16(needed: float, place: ModelPlace) -> str:
    return "" if place.dtype == "bfloat16" else f"; about {told_size(needed)} in bfloat16 on a GPU"
