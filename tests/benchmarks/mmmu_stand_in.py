"""A stand-in for MMMU: its columns and subjects, the miniature's pictures and words."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mm_cb.benchmarks.mmmu.protocol import protocol
from tests.tiny_llava import picture

COLOURS = ["red", "green", "blue", "yellow"]


def encoded(seed=0, size=(84, 42), kind="PNG"):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def row(subject, number, *, split="validation", **changes):
    """A multiple-choice question with two pictures for every third number, an open one for every fifth."""
    fixed = {f"image_{slot}": None for slot in range(1, 8)}
    fixed |= {
        "id": f"{split}_{subject}_{number}",
        "question": "what is the colour of the stone? <image 1>" + " <image 2>" * (number % 3 == 0),
        "options": repr(COLOURS),
        "answer": "ABCD"[number % 4],
        "question_type": "multiple-choice",
        "image_1": encoded(number),
    }
    if number % 3 == 0:
        fixed["image_2"] = encoded(number + 100, (30, 90), "JPEG")
    if number % 5 == 0:
        fixed |= {"question_type": "open", "options": "[]", "answer": "red"}
    return fixed | changes


def write(folder: Path, *, per_subject=3, subjects=None, split="validation", rows=None) -> Path:
    """One Parquet file per subject, laid out as on the hub."""
    for subject in subjects or protocol().subjects:
        chosen = rows or [row(subject, number, split=split) for number in range(1, per_subject + 1)]
        (folder / subject).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(chosen), folder / subject / f"{split}-00000-of-00001.parquet")
    return folder
