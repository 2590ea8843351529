"""What one step of white-box PGD on a LLaVA-NeXT costs, against the usual way to write it.

``python scripts/benchmarks/pgd.py [--json]``: a mini model with random weights on the CPU, in less than two minutes.
Counts executed FLOPs (deterministic, the gate) and prints CPU times; counts the FLOPs of the 7B shapes without running
them. Exit code 1 if a goal is missed.
``python scripts/benchmarks/pgd.py --device cuda``: the shapes of LLaVA-NeXT-Mistral-7B with random bf16 weights, made
on the GPU: milliseconds per step and behaviour, model FLOPs utilisation, hours for 133 attacks of 1000 steps.
``--tiny`` runs either with toy sizes. Needs torch, transformers and peft only.

The usual shape is that of HarmBench: one behaviour at a time, the whole model, logits at every position, weights that
require gradients (none is computed). Random weights are fair for speed: nothing here depends on the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from image_attacks import predicted_nll, target_nll  # noqa: E402
from mm_cb.models import ModelInputs, TokenRole  # noqa: E402
from mm_cb.models.last_positions import only_last_positions  # noqa: E402
from mm_cb.models.llava_next import LlavaNextModel  # noqa: E402
from mm_cb.models.shared_prefix import SharedPrefixTargets  # noqa: E402

MOST_FLOPS, LEAST_SHARING = 0.92, 6.0
MOST_LOSS, MOST_GRADIENT = 1e-5, 1e-4  # largest relative differences from the usual step
LEAST_MFU, LEAST_SPEEDUP = 0.65, 1.4


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a chat; the image is one tile large, which makes three views."""

    tile: int
    tokens: tuple[int, int, int]
    """Text tokens before the image, behind it, and in the target."""
    text: dict[str, int]
    vision: dict[str, int]

    @property
    def image_tokens(self) -> int:
        """The base view's, and the unpadded tiles' with a newline per row."""
        patches = self.tile // 14
        return patches**2 + patches * (patches + 1)


MINI = Shape(
    84,
    (1, 5, 4),  # of 88 tokens 89 % are the image's; of the 1256 at 7B 94 % are
    {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 16, "num_attention_heads": 8,
     "num_key_value_heads": 2, "vocab_size": 2048},
    {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4},
)  # fmt: skip
TINY = Shape(
    28,
    (1, 2, 2),
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
     "num_key_value_heads": 2, "vocab_size": 256},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
)  # fmt: skip
SEVEN_B = Shape(
    336,
    (5, 45, 30),
    {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
     "num_key_value_heads": 8, "vocab_size": 32064},
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
)  # fmt: skip


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of every operation that torch has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def build(shape: Shape, device: str, dtype: torch.dtype, attention: str) -> Any:
    """A random LLaVA-NeXT of this shape."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    tile = shape.tile
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**shape.vision, image_size=tile, patch_size=14),
        text_config=MistralConfig(**shape.text, sliding_window=None, max_position_embeddings=4096),
        image_token_index=shape.text["vocab_size"] - 1,
        image_grid_pinpoints=[[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile]],
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaNextForConditionalGeneration(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(default)


def chats(shape: Shape, count: int, same_prompt: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Random prompts around the image's tokens, and random targets."""
    generator = torch.Generator().manual_seed(1)
    image = torch.full((shape.image_tokens,), shape.text["vocab_size"] - 1)
    length_before, length_after, length_target = shape.tokens
    words = shape.text["vocab_size"] - 2
    before = torch.randint(0, words, (length_before,), generator=generator)
    after = torch.randint(0, words, (1 if same_prompt else count, length_after), generator=generator)
    prompts = [torch.cat([before, image, row]) for row in after.expand(count, -1)]
    return prompts, list(torch.randint(0, words, (count, length_target), generator=generator))


def usual_step(model: Any, prompts: list[Tensor], targets: list[Tensor], pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """HarmBench's shape: one behaviour at a time through the whole model. Losses (M,) and the pixels' gradient."""
    losses, gradients = [], []
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        pixels = pixel_values[row : row + 1].detach().requires_grad_()
        ids = torch.cat([prompt, target]).unsqueeze(0).to(pixels.device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < len(prompt), -100)
        tile = model.config.vision_config.image_size
        sizes = torch.tensor([[tile, tile]], device=ids.device)
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels.to(model.dtype), image_sizes=sizes,
            use_cache=False,
        ).logits  # fmt: skip
        loss = target_nll(logits, labels)
        (gradient,) = torch.autograd.grad(loss.sum(), pixels)
        losses.append(loss.detach())
        gradients.append(gradient)
    return torch.cat(losses), torch.cat(gradients)


def our_step(model: Any, prompts: list[Tensor], targets: list[Tensor], pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """The step of ``mm-cb attack``: behaviours as one batch, the model asked for nothing but the targets' logits."""
    pixels = pixel_values.detach().requires_grad_()
    read = [torch.cat([prompt, target[:-1]]) for prompt, target in zip(prompts, targets, strict=True)]
    ids, labels = torch.stack(read).to(pixels.device), torch.stack(targets).to(pixels.device)
    size = model.config.vision_config.image_size
    sizes = torch.tensor([[size, size]] * len(ids), device=ids.device)
    with only_last_positions(model, labels.shape[1]):
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.ones_like(ids).cumsum(1) - 1,
            pixel_values=pixels.to(model.dtype), image_sizes=sizes, logits_to_keep=labels.shape[1], use_cache=False,
        ).logits  # fmt: skip
    losses = predicted_nll(logits, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), pixels)
    return losses.detach(), gradient


def as_inputs(shape: Shape, prompts: list[Tensor], targets: list[Tensor], pixel_values: Tensor) -> ModelInputs:
    """The chats, all of one length, as the models of mm-cb take them."""
    ids = torch.stack([torch.cat(row) for row in zip(prompts, targets, strict=True)])
    roles = torch.zeros_like(ids).masked_fill(ids == shape.text["vocab_size"] - 1, TokenRole.IMAGE)
    roles[:, len(prompts[0]) :] = TokenRole.COMPLETION
    sizes = torch.tensor([[shape.tile, shape.tile]] * len(ids))
    ones = torch.ones(len(ids), dtype=torch.long)
    inputs = ModelInputs(ids, torch.ones_like(ids), roles, pixel_values, ones, {"image_sizes": sizes})
    return inputs.to(pixel_values.device)


def our_shared_step(objective: SharedPrefixTargets, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """The step of ``mm-cb attack --attack universal``: one picture against all targets."""
    pixels = pixel_values.detach().requires_grad_()
    losses = objective(pixels)
    (gradient,) = torch.autograd.grad(losses.sum(), pixels)
    return losses.detach(), gradient


def compare(model: Any, shape: Shape, count: int, universal: bool, repeats: int) -> dict[str, Any]:
    """FLOPs, CPU time and differences of both steps: one image per behaviour, or one for all of them."""
    prompts, targets = chats(shape, count, same_prompt=universal)
    images = 1 if universal else count
    pixel_values = torch.randn(images, 3, 3, shape.tile, shape.tile, generator=torch.Generator().manual_seed(2))

    def usual() -> tuple[Tensor, Tensor]:
        model.requires_grad_(True)
        losses, gradient = usual_step(model, prompts, targets, pixel_values.expand(count, -1, -1, -1, -1))
        return losses, gradient.sum(0, keepdim=True) if universal else gradient

    def ours() -> tuple[Tensor, Tensor]:
        model.requires_grad_(False)
        if not universal:
            return our_step(model, prompts, targets, pixel_values)
        inputs = as_inputs(shape, prompts, targets, pixel_values.expand(count, -1, -1, -1, -1))
        return our_shared_step(SharedPrefixTargets(LlavaNextModel(model, None), inputs), pixel_values)

    flops, found = {}, {}
    seconds: dict[str, list[float]] = {"usual": [], "ours": []}
    for name, step in (("usual", usual), ("ours", ours)):
        with FlopCount() as counter:
            found[name] = step()
        flops[name] = counter.total
    for _ in range(repeats):
        for name, step in (("usual", usual), ("ours", ours)):
            seconds[name].append(cpu_seconds(step))
    (loss, gradient), (our_loss, our_gradient) = found["usual"], found["ours"]
    return {
        "behaviours": count,
        "images": images,
        "gflops_usual": flops["usual"] / 1e9,
        "gflops_ours": flops["ours"] / 1e9,
        "flops_share": flops["ours"] / flops["usual"],
        "fewer": flops["usual"] / flops["ours"],
        "cpu_seconds_usual": statistics.median(seconds["usual"] or [float("nan")]),
        "cpu_seconds_ours": statistics.median(seconds["ours"] or [float("nan")]),
        "loss_difference": ((our_loss - loss).abs() / loss.abs()).max().item(),
        "gradient_difference": ((our_gradient - gradient).norm() / gradient.norm()).item(),
        "sign_agreement": (our_gradient.sign() == gradient.sign()).float().mean().item(),
    }


def cpu_seconds(step: Callable[[], Any]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    step()
    return time.process_time() - started


def on_cpu(shape: Shape, large: Shape, repeats: int) -> dict[str, Any]:
    """Both settings on the CPU, with the verdict; the first one's count again at the ``large`` shape."""
    model = build(shape, "cpu", torch.float32, "eager")  # eager attention: every product is counted
    each = compare(model, shape, 4, universal=False, repeats=repeats)
    shared = compare(model, shape, 8, universal=True, repeats=repeats)
    exact = all(r["loss_difference"] <= MOST_LOSS and r["gradient_difference"] <= MOST_GRADIENT for r in (each, shared))
    goals = {
        f"FLOPs per behaviour <= {MOST_FLOPS} of the usual step": each["flops_share"] <= MOST_FLOPS,
        f"one image, 8 targets: >= {LEAST_SHARING:.0f} x fewer FLOPs": shared["fewer"] >= LEAST_SHARING,
        "same losses and gradients": exact,
    }
    usual, ours = (flops_on_meta(large, ours) for ours in (False, True))
    counted = {"tflops_usual": usual / 1e12, "tflops_ours": ours / 1e12, "flops_share": ours / usual}
    return {"one_image_each": each, "one_image_for_all": shared, "one_image_each_at_7b": counted, "goals": goals}


def flops_on_meta(shape: Shape, ours: bool) -> int:
    """FLOPs of a step at shapes that no memory has to hold: tower, projector, language model and head, one behaviour.

    The model's own `forward` reads values (it compares numbers of image tokens), so its parts are called one by one.
    """
    model = build(shape, "meta", torch.bfloat16, "eager").requires_grad_(False)
    keep = shape.tokens[-1]
    length = sum(shape.tokens) + shape.image_tokens - int(ours)  # the last target token is only predicted
    new = {"device": "meta", "dtype": torch.bfloat16}
    pixels = torch.empty(3, 3, shape.tile, shape.tile, **new, requires_grad=True)
    with FlopCount() as counter, only_last_positions(model, keep) if ours else nullcontext():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])
        embeds = torch.zeros(1, length, shape.text["hidden_size"], **new) + 0 * features.sum()
        mask = torch.empty(1, 1, length, length, **new)
        last = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        torch.autograd.grad(model.lm_head(last).sum(), pixels)
    return counter.total


def on_gpu(shape: Shape, device: str, batches: list[int], steps: int, attention: str = "sdpa") -> dict[str, Any]:
    """Milliseconds per step and behaviour at batch sizes; the usual step runs its behaviours one by one."""
    dtype = torch.bfloat16
    rate = gemm_rate(device, dtype)
    model = build(shape, device, dtype, attention)
    useful = useful_flops(shape)
    record: dict[str, Any] = {"gemm_tflops": rate / 1e12, "useful_tflops_per_behaviour": useful / 1e12, "steps": steps}
    rows = [("usual", 1), *(("ours", batch) for batch in batches)]
    for name, batch in rows:
        try:
            milliseconds = gpu_milliseconds(model, shape, name, batch, steps, device)
        except torch.OutOfMemoryError:
            record[f"{name}_batch_{batch}"] = "out of memory"
            continue
        each = milliseconds / batch
        record[f"{name}_batch_{batch}"] = {
            "ms_per_step_and_behaviour": each,
            "mfu": useful / (each / 1e3) / rate,
            "hours_for_133_x_1000": each * 133 * 1000 / 3.6e6,
            "peak_gib": peak_gib(device),
        }
    done = [value for key, value in record.items() if key.startswith("ours") and isinstance(value, dict)]
    best = min(done, key=lambda value: value["ms_per_step_and_behaviour"]) if done else None
    usual = record["usual_batch_1"]
    if best and isinstance(usual, dict):
        speedup = usual["ms_per_step_and_behaviour"] / best["ms_per_step_and_behaviour"]
        record["speedup"] = speedup
        record["goals"] = {
            f">= {LEAST_SPEEDUP} x the usual step": speedup >= LEAST_SPEEDUP,
            f"MFU >= {LEAST_MFU}": best["mfu"] >= LEAST_MFU,
        }
    return record


def gpu_milliseconds(model: Any, shape: Shape, name: str, batch: int, steps: int, device: str) -> float:
    """Median time of a step for ``batch`` behaviours, after three for warming up."""
    prompts, targets = chats(shape, batch, same_prompt=False)
    pixel_values = torch.randn(batch, 3, 3, shape.tile, shape.tile, device=device)
    model.requires_grad_(name == "usual")
    step = usual_step if name == "usual" else our_step
    times = []
    for number in range(3 + steps):
        _synchronise(device)
        started = time.perf_counter()
        step(model, prompts, targets, pixel_values)
        _synchronise(device)
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def useful_flops(shape: Shape) -> float:
    """FLOPs that a step cannot do without, per behaviour: the weights' products, forward and back to the pixels."""
    text, vision, patches = shape.text, shape.vision, shape.tile // 14
    wide, heads = text["hidden_size"], text["num_attention_heads"]
    kv = wide * text["num_key_value_heads"] // heads
    block = 2 * wide * wide + 2 * wide * kv + 3 * wide * text["intermediate_size"]
    target = shape.tokens[-1]
    tokens = sum(shape.tokens) + shape.image_tokens
    layers = text["num_hidden_layers"] - 1
    language = layers * tokens * block + 2 * tokens * wide * kv + target * block + target * wide * text["vocab_size"]
    small = vision["hidden_size"]
    tower_block = 4 * small * small + 2 * small * vision["intermediate_size"]
    seen = 3 * (patches**2 + 1)
    tower = seen * ((vision["num_hidden_layers"] - 1) * tower_block + small * wide + wide * wide)
    attention = layers * tokens * tokens * wide + 2 * seen * (patches**2 + 1) * small * vision["num_hidden_layers"]
    return 2 * 2 * (language + tower + attention)


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of large matrix products on this machine."""
    size = 8192 if device.startswith("cuda") else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        _synchronise(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronise(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_gib(device: str) -> float | None:
    """Largest memory use since the last call; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the record as JSON only")
    parser.add_argument("--device", default="cpu", help="cpu: FLOPs of a mini model; cuda: times at 7B shapes")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; with --timed they need no GPU")
    parser.add_argument("--timed", action="store_true", help="the GPU benchmark, on any device")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 6, 8])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    if options.timed or options.device.startswith("cuda"):
        record = on_gpu(TINY if options.tiny else SEVEN_B, options.device, options.batches, options.steps)
    else:
        torch.set_num_threads(1)
        record = on_cpu(*((TINY, TINY) if options.tiny else (MINI, SEVEN_B)), repeats=2)
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    record = {"device": options.device, "tiny": options.tiny, "versions": versions} | record
    print(json.dumps(record, indent=1) if options.json else as_text(record))
    return 0 if options.tiny or all(record.get("goals", {"no result": False}).values()) else 1


def as_text(record: dict[str, Any], indent: str = "") -> str:
    """One line per value."""
    lines = []
    for name, value in record.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", as_text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value:.4g}" if isinstance(value, float) else f"{indent}{name}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
