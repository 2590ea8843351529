"""What this machine can run, said plainly."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from mm_cb import provenance
from mm_cb.errors import one_line

_GIB = 2**30


class Finding(NamedTuple):
    """One line of the table: what was looked at, whether it is fine, and what was seen."""

    name: str
    ok: bool
    detail: str


def print_findings() -> bool:
    """Print the table; returns whether everything that mm-cb needs on any machine is fine."""
    from rich.table import Table

    from mm_cb.progress import console

    findings = examine()
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(finding.name, "ok" if finding.ok else "PROBLEM", finding.detail)
    console().print(table)
    return all(finding.ok for finding in findings)


def examine() -> list[Finding]:
    """Look at packages, image backend, GPU, memory, disk and the packaged miniature."""
    return [*_packages(), _torchvision(), _gpu(), _memory(), _disk(), _miniature()]


def _packages() -> list[Finding]:
    return [
        Finding(name, version is not None, version or "not installed; run: pip install mm-cb")
        for name, version in provenance.package_versions().items()
        if name != "torchvision"
    ]


def _torchvision() -> Finding:
    from mm_cb.compat import prepare_torchvision

    version = provenance.package_versions()["torchvision"]
    state = prepare_torchvision()
    detail = {
        "absent": "not installed; images are prepared with the PIL backend",
        "compiled": f"{version}, compiled part loads",
        "declared": f"{version}, compiled part does not fit this torch build; works, mm-cb declares what is missing",
    }[state]
    return Finding("torchvision", True, detail)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", True, "none visible to torch; enough for the miniature, not for a 7B model")
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
    return Finding("GPU", True, "; ".join(names))


def _memory() -> Finding:
    gib = provenance.memory_bytes() / _GIB
    ok = gib >= 3
    return Finding("memory", ok, f"{gib:.1f} GiB" + ("" if ok else "; the demo needs 3 GiB"))


def _disk() -> Finding:
    gib = provenance.free_disk_bytes(Path.cwd()) / _GIB
    ok = gib >= 1
    return Finding("disk", ok, f"{gib:.1f} GiB free here" + ("" if ok else "; the demo needs 1 GiB") + _writable())


def _writable() -> str:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return ""
    except OSError:
        return ", but this directory is not writable: give --out"


def _miniature() -> Finding:
    try:
        from mm_cb.models import load_model

        model = load_model("miniature")
        count = sum(parameter.numel() for parameter in model.model.parameters())
    except Exception as e:  # whatever it is, the table says it
        return Finding("miniature", False, f"does not load: {one_line(str(e))[:200]}")
    return Finding("miniature", True, f"loads, {count / 1e6:.1f} million parameters")
