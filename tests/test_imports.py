"""Imports run one way, and the quick modules stay quick."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each layer may import the layers listed for it; leaves (errors, files, ...) are open to all of mm_cb.
LEAVES = {"", "compat", "endpoint", "errors", "files", "hub", "paths", "pictures", "progress", "provenance", "runs"}
MAY_IMPORT = {
    **{leaf: LEAVES for leaf in LEAVES},
    "models": LEAVES,
    "training": LEAVES | {"models", "miniature", "data"},
    "data": LEAVES | {"training"},
    "miniature": LEAVES | {"models", "training", "evaluation"},
    "evaluation": LEAVES | {"models", "miniature"},
    "report": LEAVES | {"evaluation"},
    "demo": LEAVES | {"models", "training", "miniature", "evaluation", "report"},
}
MAY_IMPORT_IMAGE_ATTACKS = {"models", "data", "evaluation", "miniature", "demo", "report"}
TOP = {"cli", "doctor", "failures", "commands"}  # what a command consists of: may import everything below


def imported_modules(path: Path) -> set[str]:
    names = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def layer(dotted: str) -> str:
    """The part of mm_cb that a dotted name belongs to: ``mm_cb.models.chat.x`` -> ``models``."""
    part = dotted.partition(".")[2].partition(".")[0]
    is_module = (ROOT / "mm_cb" / part).is_dir() or (ROOT / "mm_cb" / f"{part}.py").is_file()
    return part if is_module and part != "__init__" else ""


SOURCES = [path for package in ("mm_cb", "image_attacks") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    imported = imported_modules(path)
    if path.relative_to(ROOT).parts[0] == "image_attacks":
        assert not [name for name in imported if name.split(".")[0] == "mm_cb"]
        return
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in TOP:
        return
    allowed = MAY_IMPORT[own] | {own}
    wrong = {name for name in imported if name.split(".")[0] == "mm_cb" and layer(name) not in allowed}
    assert not wrong, f"{own or 'mm_cb'} may import {sorted(allowed - {''})}"
    if own not in MAY_IMPORT_IMAGE_ATTACKS:
        assert not [name for name in imported if name.split(".")[0] == "image_attacks"]


def in_fresh_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


HEAVY = ["torch", "transformers", "peft", "numpy", "datasets", "matplotlib", "scipy"]


@pytest.mark.parametrize("module", ["mm_cb", "mm_cb.cli", "mm_cb.runs", "mm_cb.progress"])
def test_light_modules_import_nothing_heavy(module):
    assert in_fresh_python(f"import sys, {module}; print([n for n in {HEAVY} if n in sys.modules])") == "[]"


@pytest.mark.parametrize("module", ["mm_cb.models", "image_attacks"])
def test_models_and_attacks_need_no_command_line_packages(module):
    code = f"""
import sys
for name in ("pydantic", "typer", "rich", "datasets"):
    sys.modules[name] = None
import {module}
print("imported")
"""
    assert in_fresh_python(code).endswith("imported")


def test_image_attacks_pulls_in_nothing_of_ours():
    code = "import sys, image_attacks; print([n for n in sys.modules if n.split('.')[0] == 'mm_cb'])"
    assert in_fresh_python(code) == "[]"


def test_help_is_quick():
    code = "import time, sys; from mm_cb.cli import run; run(['--help']); print('CPU', time.process_time())"
    seconds = min(float(in_fresh_python(code).rpartition("CPU")[2]) for _ in range(3))
    assert seconds < 1.0  # 0.2 on a quiet machine; the promise is 0.5


def test_transformers_imports_beside_any_torchvision():
    code = """
from mm_cb.compat import prepare_torchvision
state = prepare_torchvision()
import transformers
from transformers import LlamaConfig
print(state, prepare_torchvision() == state)
"""
    state, same = in_fresh_python(code).splitlines()[-1].split()
    assert state in {"absent", "compiled", "declared"} and same == "True"


def test_an_absent_torchvision_is_no_error():
    code = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
from mm_cb.compat import prepare_torchvision
print(prepare_torchvision())
"""
    assert in_fresh_python(code) == "absent"
