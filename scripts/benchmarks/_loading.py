"""Training steps whose rows are really read: JPEG files decoded, cut into tiles, encoded, copied to the device."""

import io
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image

from mm_cb.data.examples import SETS, Example
from mm_cb.models import ChatModel
from mm_cb.models.chat import chat
from mm_cb.training.batches import PairCollator, PairedExamples
from mm_cb.training.loading import batches_ahead
from mm_cb.training.trainer import ReroutingTrainer


def jpeg(number: int, size: tuple[int, int]) -> bytes:
    """A picture of ``size`` (width, height): noise of eight pixels, as detailed as a photograph."""
    generator = torch.Generator().manual_seed(number)
    small = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=torch.uint8, generator=generator)
    file = io.BytesIO()
    Image.fromarray(small.numpy()).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def picture_rows(size: tuple[int, int], words: dict[str, Sequence[int]]) -> list[Example]:
    """A row with a picture of its own for every count of words, in each set."""
    return [
        Example(f"{name}-{i}", chat("a " * count, images=1, completion="b"), [jpeg(i, size)], name)
        for name in SETS
        for i, count in enumerate(words[name])
    ]


def loaded_steps(
    trainer: ReroutingTrainer, model: ChatModel, rows: list[Example], steps: int, workers: int
) -> dict[str, Any]:
    """Medians over steps that take all ``rows``: seconds, of those waiting for the batch, and this process's own.

    Own processor time leaves out workers, and whatever else runs on the machine.
    """
    cuda = model.device.type == "cuda"
    half = len(rows) // 2
    order = PairedExamples(rows, steps=steps + 2, batch_size=half, batches="multimodal", seed=0)
    collator = PairCollator(model, {"text": "all", "multimodal": "after_image"})
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=0.0)
    times, waits, own = list[float](), list[float](), list[float]()
    started, spent = time.perf_counter(), time.process_time()
    for prepared in batches_ahead(order, collator, half, workers=workers, pin=cuda):
        if prepared.error is not None:
            raise prepared.error
        waits.append(time.perf_counter() - started)
        trainer.training_step(trainer.model, send_to_device(prepared.batch, model.device, non_blocking=cuda))
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        own.append(time.process_time() - spent)
        started, spent = time.perf_counter(), time.process_time()
    found = {"seconds": times, "waited": waits, "own_cpu_seconds": own}
    return {"workers": workers, **{name: statistics.median(each[2:]) for name, each in found.items()}}
