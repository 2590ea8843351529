"""Where packaged data lives, and how ids become file names."""

import hashlib
import re
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
_STEM_LENGTH = 80


def data_path(*parts: str) -> Path:
    """A file or folder under the top-level ``data/``: the wheel's packaged copy, or the checkout's own folder."""
    packaged = _PACKAGE / "_data"
    root = packaged if packaged.is_dir() else _PACKAGE.parent / "data"
    return root.joinpath(*parts)


def protocol_file(name: str) -> Any:
    """The content of ``data/protocols/<name>.yaml``."""
    import yaml

    return yaml.safe_load(data_path("protocols", f"{name}.yaml").read_text(encoding="utf-8"))


def safe_id(id: str) -> str:
    """A file stem for an id that may hold anything: ``"../Cat 1"`` -> ``"cat_1-5f0c2d9e"``.

    Stems hold only ``a-z 0-9 _ -``: no dots (``x.clean.png`` belongs to ``x``), no separators, and no capitals (some
    file systems ignore case). Whenever that changes the id, a short hash of the original keeps different ids apart.
    """
    stem = re.sub(r"[^a-z0-9_-]+", "_", id.lower())[:_STEM_LENGTH].strip("_-")
    if stem and stem == id:
        return stem
    digest = hashlib.sha256(id.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{stem or 'item'}-{digest}"
