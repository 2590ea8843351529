"""What a run was made with: package versions, code revision, machine."""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import mm_cb
from mm_cb.core.records import Hardware

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "pillow",
    "numpy",
    "safetensors",
)


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Versions of Python, of mm-cb and of the packages that decide numbers; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "mm-cb": mm_cb.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout that this package runs from, with ``+changes`` when files differ from it; else None."""
    root = Path(mm_cb.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def hardware() -> Hardware:
    """System, processor count, memory, torch threads and the names of the visible GPUs."""
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": available_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory_bytes() -> int:
    """Physical memory of the machine, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def available_memory_bytes() -> int:
    """Memory that a process can still take without swapping, as Linux says it; elsewhere all there is.

    In a container, no more than what is left below its limit: file caches are not counted, they give way.
    """
    free = _entry(Path("/proc/meminfo"), "MemAvailable:")
    held = _entry(Path("/sys/fs/cgroup/memory.stat"), "anon")
    left = memory_bytes() - (held or 0)
    return max(0, left if free is None else min(left, free * 1024))


def peak_memory_bytes() -> int | None:
    """The most that this process has held at once, as Linux says it; None elsewhere."""
    held = _entry(Path("/proc/self/status"), "VmHWM:")
    return None if held is None else held * 1024


def _entry(file: Path, name: str) -> int | None:
    """The number behind a name in one of Linux's tables; None where it is not."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return None
    return next((int(words[1]) for words in lines if words[:1] == [name]), None)


def free_disk_bytes(path: Path) -> int:
    """Free space where ``path`` lies or would be made."""
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
