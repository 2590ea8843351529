"""Training steps at the true shapes of LLaVA-NeXT-Mistral-7B with random weights, official shape against ours.

    python scripts/benchmarks/gpu.py [--steps 150] [--rows 16] [--image 336x336] [--workers 0,4] [--json FILE] [--tiny]

Text and image steps alternate, on batches made beforehand. Then image steps that read their rows: JPEG files of the
same size, prepared in this process (0) and by workers; `waited` is how long such a step stood still for them. Needs
torch, transformers, peft and accelerate. Prints time of a step, tokens a second, peak memory, and MFU: FLOPs of useful
tokens over time, as a share of what a large matrix product reaches in this run.
``--tiny`` is for trying the script on a CPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _loading import loaded_steps, picture_rows
from _rr_workload import (
    LLAVA_RECIPE,
    SEVEN_B,
    TINY,
    Shape,
    batch,
    build,
    lengths,
    meta_passes,
    official_step,
    our_step,
    our_trainer,
    seeing,
)

from mm_cb.core.files import write_json
from mm_cb.training import losses
from mm_cb.training.planning.flops import FlopCount
from mm_cb.training.precision import adapter_products


def main() -> None:
    """Time both variants in one run and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="timed steps of ours; the official shape gets a tenth")
    parser.add_argument("--rows", type=int, default=16, help="rows of each set")
    parser.add_argument("--image", default="336x336", help="height x width")
    parser.add_argument("--tokens-per-pass", type=int, default=4096)
    parser.add_argument("--workers", default="0,4", help="processes that prepare the pictures of the steps that read")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        sys.exit("this benchmark needs a GPU; --tiny tries it on a CPU.")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    with adapter_products(torch.device(device), dtype):
        compare(options, device, dtype)


def compare(options: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    """Time both variants."""
    shape = TINY if options.tiny else SEVEN_B
    height, width = (int(n) for n in options.image.split("x"))
    image = (shape.tile, shape.tile) if options.tiny else (height, width)
    model = build(shape, LLAVA_RECIPE, device, dtype)
    model.model.train()
    rate = matmul_rate(device, 256 if options.tiny else 8192)
    useful = [useful_flops(shape, options.rows, size) for size in (None, image)]
    batches = [[batch(model, shape, options.rows, size, padded) for size in (None, image)] for padded in (True, False)]
    trainer = our_trainer(model, LLAVA_RECIPE, options.tokens_per_pass)
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=0.0)
    results = {
        "ours": measure(lambda i: our_step(trainer, batches[1][i]), options.steps, optimizer, device),
        "official": measure(
            lambda i: official_step(model, batches[0][i], LLAVA_RECIPE), max(options.steps // 10, 2), optimizer, device
        ),
    }
    reading = seeing(model, shape)
    words = {name: lengths(name, shape, options.rows) for name in ("circuit_breaker", "retain")}
    rows = picture_rows((image[1], image[0]), words)
    losses.OFFICIAL_WIDTH = shape.padded
    for workers in map(int, options.workers.split(",")):
        results[f"reading, {workers} workers"] = timed = loaded_steps(
            trainer, reading, rows, max(options.steps // 4, 2), workers
        )
        if "seconds" in results["ours"]:
            timed["x_prebuilt"] = timed["seconds"] / results["ours"]["seconds"][1]
    tokens = [sum(int(made[name]["mask"].sum()) for name in ("circuit_breaker", "retain")) for made in batches[1]]
    for name, result in results.items():
        if isinstance(result.get("seconds"), list):
            text, picture = result["seconds"]
            result["tokens_per_second"] = sum(tokens) / (text + picture)
            result["mfu"] = sum(useful) / (text + picture) / rate
            result["seconds_150_steps"] = 75 * (text + picture)
        print(name, result)
    if options.json:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        write_json(options.json, {"device": name, "matmul_flops": rate, "useful_flops": useful, "results": results})


def measure(
    step: Callable[[int], torch.Tensor], steps: int, optimizer: torch.optim.Optimizer, device: str
) -> dict[str, Any]:
    """Median seconds of text and image steps, and peak memory; out of memory is a result."""
    times: list[list[float]] = [[], []]
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for number in range(steps + 4):  # the first two of each kind warm up
            started = time.perf_counter()
            step(number % 2)
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 4:
                times[number % 2].append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        return {"out_of_memory": True}
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"seconds": [statistics.median(kind) for kind in times], "peak_gb": peak}


def matmul_rate(device: str, size: int) -> float:
    """FLOPs a second of a large product in the model's type."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        left @ right
    if device == "cuda":
        torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - started)


def useful_flops(shape: Shape, rows: int, image: tuple[int, int] | None) -> int:
    """What a step needs at the least: our passes hold no padding and recompute nothing."""
    model = build(shape, LLAVA_RECIPE, "meta")
    with FlopCount() as count:
        meta_passes(model, shape, LLAVA_RECIPE, rows, image, "ours")
    return count.total


if __name__ == "__main__":
    main()
