"""What keeping prepared pictures saves: LLaVA-NeXT's tiles of a JPEG file, made and taken from the folder.

    python scripts/benchmarks/picture_cache.py [--sizes 336x336,640x480,4000x3000] [--repeats 8] [--write]

Processor time of one thread, decoding included, least of the repeats. ``--write`` puts it into
results/picture_cache.json.
"""

import argparse
import io
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from pixels import ROOT, image_processor, seconds

from mm_cb.core.files import write_json
from mm_cb.core.provenance import hardware, package_versions
from mm_cb.data.pictures import open_picture
from mm_cb.models.llava_next import LlavaNextModel

SIDE = 336
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
TILES = {
    "image_grid_pinpoints": GRIDS,
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
}
"""The published settings."""


def seeing() -> LlavaNextModel:
    """What prepares pictures of LLaVA-NeXT, without its weights; how many tokens stand for each is no matter here."""
    from transformers import LlavaNextProcessor  # behind mm_cb, which mends torchvision

    images = image_processor("llava_next", "LlavaNextImageProcessor", "pil", TILES)
    shown = LlavaNextProcessor.__new__(LlavaNextProcessor)
    vars(shown).update(image_processor=images, replace_image_token=lambda made, index: "")
    return LlavaNextModel(SimpleNamespace(), shown)


def jpeg(width: int, height: int) -> bytes:
    """A file with coarse random content."""
    coarse = torch.randint(0, 256, (height // 16, width // 16, 3), generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(coarse.byte().numpy()).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def row(size: tuple[int, int], repeats: int) -> dict[str, Any]:
    """One line of the table; ``size`` is width and height."""
    file = jpeg(*size)
    plain, kept = seeing(), seeing()
    with TemporaryDirectory() as folder:
        kept.keep_pictures(Path(folder))
        prepare = {name: partial(prepared, model, file) for name, model in (("prepared", plain), ("kept", kept))}
        prepare["kept"]()
        (held,) = Path(folder).iterdir()
        found = seconds({"decoded": lambda: open_picture(file), **prepare}, repeats)
        ms = {name: round(1000 * least, 1) for name, least in found.items()}
        return {"size": f"{size[0]}x{size[1]}", "ms": ms, "MB": round(held.stat().st_size / 1e6, 1)}


def prepared(model: LlavaNextModel, file: bytes) -> Any:
    """What the model is shown of a file."""
    return model._pictures([[open_picture(file)]])


def main() -> None:
    """Print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="336x336,640x480,4000x3000", help="width x height of the pictures")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="into results/picture_cache.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes.split(","):
        width, height = map(int, size.split("x"))
        rows.append(row((width, height), options.repeats))
        print(rows[-1], flush=True)
    if options.write:
        told = {"rows": rows, "repeats": options.repeats, "machine": hardware(), "versions": package_versions()}
        write_json(ROOT / "results" / "picture_cache.json", told)


if __name__ == "__main__":
    main()
