"""Make the frozen runs: ``python -m tests.frozen.make OUT``.

A frozen run is a small run on the miniature, kept as one revision wrote it. ``tests/test_frozen.py`` opens the kept
ones with today's code, and runs the same steps again to hold what they write against what was kept. To freeze a
revision, check it out and give ``tests/frozen/REVISION`` as OUT.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # as tests/conftest.py has it, and before torch is there
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}

import torch

from mm_cb import cli
from tests.stub_server import StubServer, user_text

INPUTS = Path(__file__).parent / "inputs"
"""Behaviours, MMMU-like and Wild-like questions, requests: what the steps read, copied into the folder of the runs."""

# Settings. Every path is relative to the folder of the runs, so that no machine's path is recorded.
MINIATURE = ["--model", "miniature"]
BREAKER = [*MINIATURE, "--adapter", "breaker"]
RECIPE = ["miniature", "training.max_steps=6", "training.batch_size=4", "lora.r=2"]
RECIPE += ["training.held_out=2", "training.held_out_steps=3"]
RECIPE += ["training.learning_rate=0.005", "training.start_distance=0"]  # as the recipe had it then
RECIPE += ["circuit_breaker.schedule_steps=null", "training.average_last=0"]
BEHAVIORS = ["--behaviors", "inputs/behaviors.jsonl"]
BUDGET = [*BEHAVIORS, "--epsilon", "32/255", "--steps", "12", "--samples", "1", "--max-new-tokens", "24"]
ON_BREAKER = [*BREAKER, "--attack", "no_attack,pgd,pgd_adaptive", *BUDGET, "--out", "attack"]
BATTERY = [*BEHAVIORS, "--count", "1", "--steps", "2", "--iterates", "1"]
MMMU = ["--data", "inputs/mmmu", "--subjects", "Art,Music", "--max-new-tokens", "8"]
WILD = ["--data", "inputs/wild", "--own-rule", "inputs/rule.txt", "--max-new-tokens", "12"]
WILD += ["--judge-model", "judge", "--judge-endpoint", "JUDGE_URL"]
REQUESTS = ["--data", "inputs/requests.jsonl", "--max-new-tokens", "24"]
JUDGED = ["--attack", "noise,pgd", "--behaviors", "inputs/two.jsonl", "--steps", "12", "--restarts", "2"]
JUDGED += ["--iterates", "1", "--samples", "1"]

STEPS: list[tuple[str, list[str]]] = [
    ("train", ["train", *RECIPE, "--out", "train"]),
    ("attack", ["attack", *ON_BREAKER, "--shard", "1/2"]),
    ("attack", ["attack", *ON_BREAKER, "--shard", "2/2"]),
    ("attack", ["attack", *ON_BREAKER]),
    ("attack-base", ["attack", *MINIATURE, "--attack", "no_attack,pgd", *BUDGET, "--out", "attack-base"]),
    ("transfer", ["attack", "transfer", "attack-base", "attack", *BEHAVIORS, "--out", "transfer"]),
    ("check", ["attack", "check", *BREAKER, *BATTERY, "--out", "check"]),
    ("mmmu-base", ["eval", "mmmu", *MINIATURE, *MMMU, "--out", "mmmu-base"]),
    ("mmmu", ["eval", "mmmu", *BREAKER, *MMMU, "--out", "mmmu"]),
    ("llava-wild", ["eval", "llava-wild", *BREAKER, *WILD, "--out", "llava-wild"]),
    ("over-refusal", ["eval", "over-refusal", *BREAKER, *REQUESTS, "--out", "over-refusal"]),
    ("beside", ["eval", "over-refusal", *BREAKER, *REQUESTS, "--beside", "attack", "--out", "beside"]),
    ("judged", ["attack", *MINIATURE, *JUDGED, "--out", "judged"]),
    ("judged", ["judge", "judged", "--judge", "miniature", "--behaviors", "inputs/two.jsonl"]),
    ("judged", ["judge", "judged", "--judge", "refusal-strings"]),
]
"""Names of runs, and the command lines that make them, in order. JUDGE_URL is the address of a made-up judge."""

NAMES = tuple(dict.fromkeys(name for name, _ in STEPS))


def make(out: Path, breaker: Path | None = None) -> None:
    """Make every run.

    Args:
        out: New folder; gets a folder per run and machine.json.
        breaker: The adapter that is attacked and measured; None = the one that the first step trains. Training
            amplifies rounding, so a given one keeps what lies behind it comparable on another machine.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    shutil.copytree(INPUTS, out / "inputs")
    breaker = (out / "train" if breaker is None else breaker).resolve()
    with (
        contextlib.chdir(out),
        mock.patch.dict(os.environ, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"),
        StubServer(_scores) as judge,
    ):
        for name, argv in STEPS:
            code = cli.run([judge.url if word == "JUDGE_URL" else word for word in argv])
            if code:
                raise RuntimeError(f"{name}: exit code {code} of: mm-cb {' '.join(argv)}")
            if name == "train":
                shutil.copytree(breaker, "breaker")
    (out / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    for folder in ("inputs", "breaker"):
        shutil.rmtree(out / folder)
    for lock in out.rglob(".lock"):
        lock.unlink()


def _scores(request: dict[str, Any], number: int) -> str:
    """A judgement that differs with the answer judged."""
    return f"8 {1 + len(user_text(request)) % 9}\nmade up"


def machine() -> dict[str, Any]:
    """What decides whether numbers come out bit for bit: processor, packages, threads."""
    packages = ("torch", "torchvision", "transformers", "peft", "numpy", "pillow", "safetensors")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    wanted = ("vendor_id", "cpu family", "model", "cache size", "flags", "CPU implementer", "CPU part", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {key: fields[key] for key in wanted if key in fields}


if __name__ == "__main__":
    make(Path(sys.argv[1]))
