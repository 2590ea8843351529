"""Training and attack steps at the true shapes of LLaVA-NeXT-Mistral-7B with random weights, on a GPU.

    python scripts/benchmarks/gpu.py [--steps 150] [--rows 16] [--image 336x336] [--workers 4,0] [--write] [--tiny]

One command for the day a GPU is there, made to end within 15 minutes: parts that have not begun after 12 are skipped.
Each part makes its model anew, and its result is in the file as soon as it has ended.

- ours: text and image steps alternate, on batches made beforehand; also with flash attention, a tenth of the steps.
- reading: image steps that read JPEG files, prepared in this process (0 workers) or by workers; `waited` is how long a
  step stood still for them, `seconds_150_steps` counts as many text steps.
- memory: peaks of a picture of the size that takes most tokens and up to 1024 tokens of text, beside their goals.
- pgd: milliseconds of an attack's step, hours for 133 behaviours of 1000 steps; also with flash attention.
- strong, official: the steps that `rr.py` compares with ours.

MFU: FLOPs of useful tokens over time, as a share of what a large matrix product reaches in this run. Needs torch,
transformers, peft, accelerate and pydantic; parts that need bitsandbytes or flash-attn say where it is missing.
``--write`` keeps the results in results/gpu.json, with the device's name. ``--tiny`` is for trying the script on a CPU.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pgd
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
    strong_step,
)

from mm_cb.core.files import write_json
from mm_cb.training import losses
from mm_cb.training.hidden_states import use_row_attention
from mm_cb.training.planning.flops import FlopCount
from mm_cb.training.precision import adapter_products
from mm_cb.training.recompute import recompute_blocks

LAST_START = 12 * 60  # seconds after the start, behind which no part begins
FLASH = "flash_attention_2"
RESULTS = Path(__file__).resolve().parents[2] / "results" / "gpu.json"


@dataclass(frozen=True)
class Setting:
    """What `mm-cb train` is told where memory is short, and the GB that shall be enough."""

    tokens_per_pass: int = 4096
    recompute: bool = False
    four_bit: bool = False
    goal_gb: float = 16.0
    attention: str = "sdpa"


SETTINGS = {
    "default": Setting(),
    "recompute=true tokens_per_pass=2048": Setting(2048, True, goal_gb=12.0),
    "quantize=4bit recompute=true tokens_per_pass=2048": Setting(2048, True, True, 8.0),
}


@dataclass(frozen=True)
class Job:
    """What the parts share."""

    shape: Shape
    device: str
    rows: int
    steps: int
    image: tuple[int, int]
    """Height and width."""
    rate: float
    """FLOPs a second of a large product."""

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, on a CPU float32."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def batches(self, model: Any, image: tuple[int, int], padded: bool) -> list[dict]:
        """A text and an image batch."""
        return [batch(model, self.shape, self.rows, size, padded) for size in (None, image)]


def main() -> int:
    """Run the parts in the order of what matters most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="timed steps of ours; the others get a tenth")
    parser.add_argument("--rows", type=int, default=16, help="rows of each set")
    parser.add_argument("--image", default="336x336", help="height x width")
    parser.add_argument("--workers", default="4,0", help="processes that prepare the pictures of the steps that read")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--write", action="store_const", const=RESULTS, dest="json", help="there: results/, tracked")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        sys.exit("this benchmark needs a GPU; --tiny tries it on a CPU.")
    if options.tiny and options.json == RESULTS:
        parser.error("--write keeps what the true sizes give: leave out --tiny, or name another file with --json.")
    shape = TINY if options.tiny else SEVEN_B
    height, width = (shape.tile,) * 2 if options.tiny else map(int, options.image.split("x"))
    rate = matmul_rate(device, 256 if options.tiny else 8192)
    job = Job(shape, device, options.rows, options.steps, (height, width), rate)
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {name: installed(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "flash-attn")},
        "matmul_flops": rate,
        "results": {},
    }
    with adapter_products(torch.device(device), job.dtype):
        return run(parts(job, [int(n) for n in options.workers.split(",")]), record, options.json)


def parts(job: Job, workers: list[int]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name → what measures it."""
    few = max(job.steps // 10, 2)
    return {
        "ours": partial(ours, job, Setting(), job.image, job.steps),
        **{f"reading, {number} workers": partial(reading, job, number) for number in workers},
        **{f"memory, {name}": partial(peak, job, setting) for name, setting in SETTINGS.items()},
        "pgd": partial(attack, job, "sdpa"),
        "strong": partial(baseline, job, strong_step, few),
        "official": partial(baseline, job, official_step, few),
        "ours, flash attention": partial(ours, job, Setting(attention=FLASH), job.image, few),
        "pgd, flash attention": partial(attack, job, FLASH),
    }


def run(todo: dict[str, Callable[[], dict[str, Any]]], record: dict[str, Any], file: Path | None) -> int:
    """Measure part by part; what one could not do is its result, and 1 is returned where that was not foreseen."""
    started, failed = time.perf_counter(), False
    for name, part in todo.items():
        if time.perf_counter() - started > LAST_START:
            result: dict[str, Any] = {"skipped": f"not begun {LAST_START // 60} minutes after the start"}
        else:
            try:
                result = part()
            except torch.OutOfMemoryError:
                result = {"out_of_memory": True}
            except ModuleNotFoundError as error:
                result = {"not_installed": error.name}
            except Exception as error:  # the other parts are still worth their time
                result, failed = {"failed": f"{type(error).__name__}: {error}"}, True
        record["results"][name] = result
        record["seconds"] = time.perf_counter() - started
        print(name, result, flush=True)
        if file:
            write_json(file, record)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
    return int(failed)


def ours(job: Job, setting: Setting, image: tuple[int, int], steps: int) -> dict[str, Any]:
    """Steps of the shipped trainer."""
    refuse_absent(setting.attention)
    model = build(job.shape, LLAVA_RECIPE, job.device, job.dtype, four_bit=setting.four_bit)
    if setting.recompute:
        recompute_blocks(model)
    trainer = our_trainer(model, LLAVA_RECIPE, setting.tokens_per_pass)
    use_row_attention(model, setting.attention)
    model.base.lm_head = torch.nn.Identity()  # which training does not load
    batches = job.batches(model, image, False)
    after_image(batches[1])
    return rates(job, image, batches, measure(lambda i: our_step(trainer, batches[i]), steps, model, job.device))


def after_image(made: dict) -> None:
    """The recipe's mask: tokens of pictures, which come first here, do not count in the loss."""
    for name in ("circuit_breaker", "retain"):
        made[name]["mask"] = made[name]["mask"] * ~made[name]["inputs"].image_mask
        made[name]["counted"] = made[name]["mask"].sum(-1).tolist()


def peak(job: Job, setting: Setting) -> dict[str, Any]:
    """Peak memory where a picture takes most tokens, beside the goal."""
    most = (2 * job.shape.tile, 2 * job.shape.tile)
    found = ours(job, setting, most, 2)
    met = None if found["peak_gb"] is None else found["peak_gb"] <= setting.goal_gb
    return {**found, "goal_gb": setting.goal_gb, "met": met}


def baseline(job: Job, step: Callable[..., torch.Tensor], steps: int) -> dict[str, Any]:
    """Steps of another shape, with the padding that is its own."""
    model = build(job.shape, LLAVA_RECIPE, job.device, job.dtype)
    batches = job.batches(model, job.image, step is official_step)
    found = measure(lambda i: step(model, batches[i], LLAVA_RECIPE), steps, model, job.device)
    return rates(job, job.image, batches, found)


def reading(job: Job, workers: int) -> dict[str, Any]:
    """Image steps that read their rows, as many as a run of ``job.steps`` has."""
    model = build(job.shape, LLAVA_RECIPE, job.device, job.dtype)
    trainer = our_trainer(model, LLAVA_RECIPE)
    words = {name: lengths(name, job.shape, job.rows) for name in ("circuit_breaker", "retain")}
    rows = picture_rows((job.image[1], job.image[0]), words)
    losses.OFFICIAL_WIDTH = job.shape.padded
    texts = job.batches(model, job.image, False)[0]
    text = measure(lambda i: our_step(trainer, texts), 2, model, job.device)["seconds"][0]
    found = loaded_steps(trainer, seeing(model, job.shape), rows, max(job.steps // 2, 2), workers)
    return {**found, "seconds_150_steps": 75 * (text + found["seconds"])}


def attack(job: Job, attention: str) -> dict[str, Any]:
    """Steps of PGD, see `pgd.on_gpu`."""
    refuse_absent(attention)
    tiny = job.shape == TINY
    shape, batches = (pgd.TINY, [1, 2]) if tiny else (pgd.SEVEN_B, [1, 4, 8])
    return pgd.on_gpu(shape, job.device, batches, 2 if tiny else 10, attention)


def refuse_absent(attention: str) -> None:
    """Find out that flash-attn is not here: there is nothing to measure then."""
    if attention == FLASH:
        import flash_attn  # noqa: F401


def rates(job: Job, image: tuple[int, int], batches: list[dict], found: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak, with what follows from them."""
    both = sum(found["seconds"])
    tokens = sum(sum(made[name]["lengths"]) for made in batches for name in ("circuit_breaker", "retain"))
    useful = sum(useful_flops(job.shape, job.rows, size) for size in (None, image))
    follows = {"tokens_per_second": tokens / both, "mfu": useful / both / job.rate, "seconds_150_steps": 75 * both}
    return {**found, **follows, "useful_flops": useful}


def measure(step: Callable[[int], torch.Tensor], steps: int, model: Any, device: str) -> dict[str, Any]:
    """Median seconds of text and image steps, and peak memory in GB (1e9 bytes)."""
    model.model.train()
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=0.0)
    times: list[list[float]] = [[], []]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(steps + 4):  # the first two of each kind warm up
        started = time.perf_counter()
        step(number % 2)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 4:
            times[number % 2].append(time.perf_counter() - started)
    highest = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"seconds": [statistics.median(kind) for kind in times], "peak_gb": highest}


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


@cache
def useful_flops(shape: Shape, rows: int, image: tuple[int, int] | None) -> int:
    """What a step needs at the least: our passes hold no padding and recompute nothing."""
    model = build(shape, LLAVA_RECIPE, "meta")
    with FlopCount() as count:
        meta_passes(model, shape, LLAVA_RECIPE, rows, image, "ours")
    return count.total


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
