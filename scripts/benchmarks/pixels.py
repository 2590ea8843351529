"""What exact pixels cost: our forward and backward pass beside the real image processor, in one process, turn by turn.

    python scripts/benchmarks/pixels.py [--sizes 640x480,1600x1200] [--repeats 8] [--family InternVL] [--write]

Processor time of one thread, least of the repeats: forward alone, forward and backward, the real processor, and the
ratios. Settings are the published ones; both backends. ``--write`` puts the table into results/pixels.json;
rows of one family alone take the place of its rows there, with the revision that they are of.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mm_cb.core.files import write_json  # noqa: E402
from mm_cb.core.provenance import git_revision, package_versions  # noqa: E402
from mm_cb.models.aya_vision import AyaVisionModel  # noqa: E402
from mm_cb.models.gemma3 import Gemma3Model  # noqa: E402
from mm_cb.models.gemma4 import Gemma4Model  # noqa: E402
from mm_cb.models.internvl import InternVLModel  # noqa: E402
from mm_cb.models.llava import LlavaModel  # noqa: E402
from mm_cb.models.mistral3 import Mistral3Model  # noqa: E402
from mm_cb.models.qwen_vl import QwenVLModel  # noqa: E402
from mm_cb.models.smolvlm import SmolVLMModel  # noqa: E402

TABLE = ROOT / "results" / "pixels.json"

FAMILIES: dict[str, tuple[type, str, str, dict[str, Any]]] = {
    "Mistral 3": (
        Mistral3Model,
        "pixtral",
        "PixtralImageProcessor",
        {"size": {"longest_edge": 1540}, "patch_size": {"height": 28, "width": 28}},
    ),
    "LLaVA-1.5": (
        LlavaModel,
        "clip",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "Qwen2.5-VL": (QwenVLModel, "qwen2_vl", "Qwen2VLImageProcessor", {}),
    "Gemma 3": (Gemma3Model, "gemma3", "Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}),
    "Gemma 4": (Gemma4Model, "gemma4", "Gemma4ImageProcessor", {}),
    "InternVL": (
        InternVLModel,
        "got_ocr2",
        "GotOcr2ImageProcessor",
        {"size": {"height": 448, "width": 448}, "max_patches": 12},
    ),
    "Aya Vision": (
        AyaVisionModel,
        "got_ocr2",
        "GotOcr2ImageProcessor",
        {"size": {"height": 364, "width": 364}, "max_patches": 12, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "SmolVLM": (
        SmolVLMModel,
        "smolvlm",
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    ),
}

CONFIGURED = SimpleNamespace(
    config=SimpleNamespace(vision_config=SimpleNamespace(patch_size=14, image_size=1540), spatial_merge_size=2)
)
"""What families read of their model beside the processor, as Mistral Small 3.1 has it."""


def image_processor(module: str, name: str, backend: str, settings: dict[str, Any]) -> Any:
    """A transformers image processor of one backend."""
    from importlib import import_module

    part = "image_processing_pil" if backend == "pil" else "image_processing"
    kinds = import_module(f"transformers.models.{module}.{part}_{module}")
    return getattr(kinds, name + ("Pil" if backend == "pil" else ""))(**settings)


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least processor time of each, taken in turn."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):  # the first warms up, and counts where it is the least
        for name, run in runs.items():
            begun = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - begun)
    return least


def row(family: str, size: tuple[int, int], backend: str, repeats: int) -> dict[str, Any]:
    """One line of the table; ``size`` is width and height."""
    kind, module, name, settings = FAMILIES[family]
    images = image_processor(module, name, backend, settings)
    model = kind(CONFIGURED, SimpleNamespace(image_processor=images))
    preprocess = model.preprocessing((size[1], size[0]))
    assert preprocess.exact_by == "emulation", (family, size, backend)
    levels = torch.randint(0, 256, (1, 3, size[1], size[0]), generator=torch.Generator().manual_seed(0))
    pixels = levels.float() / 255
    variable = pixels.clone().requires_grad_()
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: preprocess(pixels),
        "forward and backward": lambda: torch.autograd.grad(preprocess(variable).sum(), variable),
        "processor": lambda: preprocess._call_processor(levels),
    }
    with torch.no_grad():
        runs["forward"]()
    found = {name: round(1000 * least, 2) for name, least in seconds(runs, repeats).items()}
    ratio = round(found["forward"] / found["processor"], 2)
    return {"family": family, "size": f"{size[0]}x{size[1]}", "backend": backend, "ms": found, "ratio": ratio}


def main() -> None:
    """Print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="640x480,1600x1200", help="width x height of the pictures")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--family", choices=FAMILIES, help="this one alone")
    parser.add_argument("--write", action="store_true", help="into results/pixels.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(int(width), int(height)) for width, height in (one.split("x") for one in options.sizes.split(","))]
    print(f"{'family':12}{'size':>10}  {'backend':12}{'forward':>9}{'and back':>9}{'real':>9}{'ratio':>7}   (ms)")
    rows = []
    for family in [options.family] if options.family else FAMILIES:
        for size in sizes:
            for backend in ("pil", "torchvision"):
                rows.append(row(family, size, backend, options.repeats))
                numbers = "".join(f"{value:9.1f}" for value in rows[-1]["ms"].values())
                print(f"{family:12}{rows[-1]['size']:>10}  {backend:12}{numbers}{rows[-1]['ratio']:7.2f}", flush=True)
    if options.write:
        content = {"rows": rows, "repeats": options.repeats, "versions": package_versions(), "git": git_revision()}
        if options.family:
            own = [one | {"repeats": options.repeats, "git": git_revision()} for one in rows]
            content = json.loads(TABLE.read_text(encoding="utf-8"))
            content["rows"] = [one for one in content["rows"] if one["family"] != options.family] + own
        write_json(TABLE, content)


if __name__ == "__main__":
    main()
