"""What the training benchmarks share: models by shape, rows by length, the official-style step, a strong one, ours."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mm_cb  # noqa: E402, F401  (first: it mends a torchvision that does not fit this torch)

# isort: split

from transformers import (  # noqa: E402
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    TrainingArguments,
)
from transformers.image_processing_utils import select_best_resolution  # noqa: E402

from mm_cb.models import ModelInputs, TokenRole  # noqa: E402
from mm_cb.models.llava_next import LlavaNextModel  # noqa: E402
from mm_cb.training import losses  # noqa: E402
from mm_cb.training.adapter import add_adapter  # noqa: E402
from mm_cb.training.batches import SetRows  # noqa: E402
from mm_cb.training.hidden_states import Rows, hidden_states, use_row_attention  # noqa: E402
from mm_cb.training.losses import reroute_coeff, retain_coeff  # noqa: E402
from mm_cb.training.placement import KeptBlocks, lora_paths  # noqa: E402
from mm_cb.training.trainer import Rerouting, ReroutingTrainer  # noqa: E402
from tests.reference.released_trainer import released_loss, released_states  # noqa: E402

# Text tokens of 16 rows of each set, of 1024 in the released padding. Made to have the fills that were measured
# on the released data: retain 0.52 (short XSTest and long UltraChat rows), circuit breaker 0.29. Numbers only.
PADDED = 1024
LENGTHS = {
    "retain": [98, 140, 165, 182, 200, 214, 231, 262, 330, 830, 890, 935, 985, 1010, 1024, 1024],
    "circuit_breaker": [176, 201, 215, 232, 248, 262, 275, 288, 301, 312, 325, 340, 356, 372, 398, 447],
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA-NeXT, with blocks up to what training keeps."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_hidden: int
    vision_ffn: int
    vision_layers: int
    tile: int
    padded: int


SEVEN_B = Shape(4096, 14336, 32, 8, 32064, 1024, 4096, 24, 336, PADDED)
MINI = Shape(256, 896, 8, 2, 2048, 128, 512, 6, 112, 120)  # same shares of head, tower and image tokens within 20 %
TINY = Shape(64, 128, 4, 2, 4096, 32, 64, 2, 42, 16)


@dataclass(frozen=True)
class Recipe:
    """Where the adapter sits and what it reroutes."""

    blocks: tuple[int, ...]
    targets: tuple[int, ...]


Step = Literal["official", "strong", "ours"]
"""Whose step: in the shape of the released trainer, plain PEFT at its best, mm-cb's."""
LLAVA_RECIPE = Recipe((14, 15, 16), (16,))  # the paper's
TEXT_RECIPE = Recipe(tuple(range(21)), (10, 20))  # the released text trainer's


def build(
    shape: Shape, recipe: Recipe, device: str, dtype: torch.dtype = torch.float32, four_bit: bool = False
) -> LlavaNextModel:
    """A random model with a random adapter (B too), cut to what the official trainer keeps, head in place.

    Raises:
        ModuleNotFoundError: If it is to have 4-bit blocks, and bitsandbytes is not installed.
    """
    tile = shape.tile
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden, intermediate_size=shape.vision_ffn, image_size=tile, patch_size=14,
            num_hidden_layers=shape.vision_layers, num_attention_heads=max(shape.vision_hidden // 64, 1),
        ),
        text_config=MistralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=max(recipe.targets) + 1,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
            max_position_embeddings=4096, sliding_window=None, head_dim=shape.hidden // shape.heads,
        ),
        image_token_index=shape.vocabulary - 1,
        image_grid_pinpoints=[[tile * h, tile * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            base = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    head = base.lm_head
    model = LlavaNextModel(base.eval().requires_grad_(False), None)
    paths = lora_paths(model, recipe.blocks, PROJECTIONS)
    kept = KeptBlocks(max(recipe.targets) + 1, final_norm=True)
    if four_bit:
        quantise_blocks(model, dtype)
    model = add_adapter(model, paths, kept, r=16 if shape == SEVEN_B else 4, lora_alpha=16, dropout=0.0)
    model.base.lm_head = head
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    use_row_attention(model)  # padded passes go through transformers' sdpa as before
    return model


def quantise_blocks(model: LlavaNextModel, dtype: torch.dtype) -> None:
    """Put NF4 weights with double quantisation into the decoder blocks, as ``quantize: 4bit`` does for stored ones."""
    import bitsandbytes

    for block in model.decoder_blocks:
        for path, old in [(p, m) for p, m in block.named_modules() if isinstance(m, torch.nn.Linear)]:
            new = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            block.set_submodule(path, new.to(old.weight.device))
    model.base.is_loaded_in_4bit = True  # PEFT asks it


def seeing(model: LlavaNextModel, shape: Shape) -> LlavaNextModel:
    """The model with a processor: the published one for pictures at the shape's tiles, the miniature's words."""
    from mm_cb.miniature.making.build import build_processor

    config, processor = model.base.config, build_processor()
    images = processor.image_processor
    images.size, images.crop_size = {"shortest_edge": shape.tile}, {"height": shape.tile, "width": shape.tile}
    images.image_grid_pinpoints = config.image_grid_pinpoints
    config.image_token_id = processor.image_token_id
    model.processor = processor
    return model


def lengths(name: str, shape: Shape, rows: int) -> list[int]:
    """Text tokens of ``rows`` rows, spread evenly over the 16."""
    chosen = [LENGTHS[name][(2 * i + 1) * 16 // (2 * rows)] for i in range(rows)]
    return [max(round(n * shape.padded / PADDED), 3) for n in chosen]


def batch(model: LlavaNextModel, shape: Shape, rows: int, image: tuple[int, int] | None, padded: bool) -> dict:
    """Random rows of both sets, padded to the released trainer's width or to the longest row.

    Args:
        model: For its device and its count of image tokens.
        shape: The model's.
        rows: Of each set.
        image: Height and width of every row's picture, or None.
        padded: Whether to pad as the released trainer does.

    Returns:
        What the trainer's collator makes; all tokens count, as in the released trainer.
    """
    generator = torch.Generator().manual_seed(1)
    made: dict = {"modality": "text" if image is None else "multimodal"}
    images = 0 if image is None else image_tokens(shape, image)
    for name in ("circuit_breaker", "retain"):
        counts = [images + n for n in lengths(name, shape, rows)]
        width = images + shape.padded if padded else max(counts)
        mask = (torch.arange(width) < torch.tensor(counts)[:, None]).long()
        ids = torch.randint(3, shape.vocabulary - 1, (rows, width), generator=generator) * mask
        ids[:, :images] = shape.vocabulary - 1
        roles = torch.full((rows, width), int(TokenRole.USER)).masked_fill(ids == shape.vocabulary - 1, TokenRole.IMAGE)
        pictures = {}
        if image is not None:
            tiles = 1 + grid(shape, image)[0] * grid(shape, image)[1]
            pictures = {
                "pixel_values": torch.randn(rows, tiles, 3, shape.tile, shape.tile, generator=generator),
                "beside": {"image_sizes": torch.tensor([image] * rows)},
                "images_per_row": torch.ones(rows).long(),
            }
        inputs = ModelInputs(ids, mask, roles * mask, **pictures).to(model.device)
        numbers = [str(number) for number in range(rows)]
        real = inputs.attention_mask.sum(-1).tolist()
        rows_of: SetRows = {
            "inputs": inputs, "mask": inputs.attention_mask, "ids": numbers, "lengths": real, "counted": real,
        }  # fmt: skip
        made[name] = rows_of
    return made


def grid(shape: Shape, image: tuple[int, int]) -> tuple[int, int]:
    """Tiles (down, across) that LLaVA-NeXT cuts a picture into, besides the base view."""
    options = [[shape.tile * h, shape.tile * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    height, width = select_best_resolution(image, options)
    return height // shape.tile, width // shape.tile


def image_tokens(shape: Shape, image: tuple[int, int]) -> int:
    """Tokens that stand for a picture: the base view's, and the grid's without its black margins, with line ends."""
    side = shape.tile // 14
    down, across = (n * side for n in grid(shape, image))
    height, width = image
    if width / height > across / down:
        margin = (down - int(round(height * (across / width), 7))) // 2
        down -= 2 * margin
    else:
        margin = (across - int(round(width * (down / height), 7))) // 2
        across -= 2 * margin
    return side**2 + down * (across + 1)


def model_kwargs(inputs: ModelInputs) -> dict:
    """Keyword arguments of the transformers model."""
    names = ("input_ids", "attention_mask", "pixel_values")
    return {name: value for name in names if (value := getattr(inputs, name)) is not None} | dict(inputs.beside)


@contextmanager
def checkpointed(model: LlavaNextModel) -> Iterator[None]:
    """The released trainer's gradient checkpointing; text embeddings require gradients with it.

    Only the language tower: the usual switch of transformers would also pull the image tower into the backward pass.
    """
    tower = model.base.get_submodule(model.language_path.rpartition(".")[0])
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.train()
    hook = tower.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        yield
    finally:
        hook.remove()
        tower.gradient_checkpointing_disable()
        model.model.eval()


@contextmanager
def without_head(model: LlavaNextModel) -> Iterator[None]:
    """No logits are computed."""
    head, model.base.lm_head = model.base.lm_head, torch.nn.Identity()
    try:
        yield
    finally:
        model.base.lm_head = head


def official_step(
    model: LlavaNextModel, made: dict, recipe: Recipe, alpha: float = 5.0, at: float = 0.3
) -> torch.Tensor:
    """One step in the shape of the released trainer, pictures passed on: gradients are left in the parameters."""
    with checkpointed(model):
        return _released_step(model, made, recipe, alpha, at)


def strong_step(model: LlavaNextModel, made: dict, recipe: Recipe, alpha: float = 5.0, at: float = 0.3) -> torch.Tensor:
    """One step of plain PEFT at its best: the adapter off and on by its own switch, no head, nothing checkpointed.

    One padded pass of each set and side; pad ``made`` to the longest row. Gradients are left in the parameters.
    """
    with without_head(model):
        return _released_step(model, made, recipe, alpha, at)


def _released_step(model: LlavaNextModel, made: dict, recipe: Recipe, alpha: float, at: float) -> torch.Tensor:
    kwargs = [model_kwargs(made[name]["inputs"]) for name in ("circuit_breaker", "retain")]
    loss = released_loss(model.model, *kwargs, recipe.targets, alpha * (1 - at), alpha * at)
    loss.backward()
    return loss.detach()


def our_trainer(
    model: LlavaNextModel, recipe: Recipe, tokens_per_pass: int = 4096, alpha: float = 5.0
) -> ReroutingTrainer:
    """The shipped trainer, in the middle of a run: its coefficients are 0.7 and 0.3 times alpha."""
    trainer = ReroutingTrainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(), use_cpu=model.device.type == "cpu", report_to="none", remove_unused_columns=False
        ),
        Rerouting(alpha, recipe.targets, "all", "official"),
        [0],  # type: ignore[arg-type]  # no rows: the benchmark calls single steps
        lambda rows: rows,  # type: ignore[arg-type]
        tokens_per_pass=tokens_per_pass,
    )
    trainer.state.global_step, trainer.state.max_steps = 60, 100
    assert abs(retain_coeff(60, 100, alpha) - 0.3 * alpha) < 1e-9 and reroute_coeff(60, 100, alpha) > 0
    return trainer


def our_step(trainer: ReroutingTrainer, made: dict) -> torch.Tensor:
    """One step of the shipped trainer at the batch's own width; gradients are left in the parameters."""
    losses.OFFICIAL_WIDTH = made["retain"]["mask"].shape[1]
    return trainer.training_step(trainer.model, made).detach()


def gradients(model: LlavaNextModel) -> dict[str, torch.Tensor]:
    """Take the adapter's gradients away."""
    taken = {}
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad:
            taken[name], parameter.grad = parameter.grad.float(), None
    return taken


def meta_passes(model: LlavaNextModel, shape: Shape, recipe: Recipe, rows: int, image, step: Step) -> None:
    """The matrix products of one step on meta tensors: shapes alone, no memory."""
    images = 0 if image is None else image_tokens(shape, image)
    if image is not None:
        tiles = 1 + grid(shape, image)[0] * grid(shape, image)[1]
        pixels = torch.empty(rows, tiles, 3, shape.tile, shape.tile, device="meta")
        with torch.no_grad():
            for _ in range(2 if step == "ours" else 4):  # two sets; the others see each picture on both sides
                model.base.get_image_features(pixels, image_sizes=torch.tensor([image] * rows), return_dict=True)
    for name, last in (("circuit_breaker", max(recipe.targets)), ("retain", max(recipe.targets) + 1)):
        counts = [images + n for n in lengths(name, shape, rows)]
        if step == "ours":
            masked = image is not None and recipe == LLAVA_RECIPE  # its mask, after_image
            _our_pass(model, shape, recipe, counts, images if masked else 0, last)
            continue
        width = images + shape.padded if step == "official" else max(counts)
        around = checkpointed if step == "official" else without_head
        with around(model):
            new = _padded_pass(model, shape, rows, width, step == "official")
            (torch.stack(new).sum() if name == "retain" else new[last].sum()).backward()


def _padded_pass(model: LlavaNextModel, shape: Shape, rows: int, width: int, needs_grad: bool) -> list[torch.Tensor]:
    """Adapted hidden states, behind a pass without the adapter."""
    embeds = torch.empty(rows, width, shape.hidden, device="meta").requires_grad_(needs_grad)
    mask = torch.empty(1, 1, width, width, dtype=torch.bool, device="meta")
    return released_states(model.model, {"inputs_embeds": embeds, "attention_mask": mask})[1]


def _our_pass(model: LlavaNextModel, shape: Shape, recipe: Recipe, counts: list[int], left_out: int, last: int) -> None:
    """Both sides of a set and the way back; the first ``left_out`` tokens of each row do not count in the loss."""
    embeds = torch.empty(sum(counts), shape.hidden, device="meta")
    positions = torch.empty(sum(counts), dtype=torch.long, device="meta")
    rows = Rows(embeds, positions, tuple(counts), positions)
    if left_out:
        rows = rows._replace(counted=positions[left_out * len(counts) :])
    states = hidden_states(model, rows, min(recipe.blocks), last)
    torch.stack(states.adapted).sum().backward()
