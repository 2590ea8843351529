"""Every function of the packages that takes a file's content apart reads some sample of the table."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.samples import ROOT
from tests.fuzz.test_fuzz import attempt, sample

DECODES = {"loads", "safe_load", "DictReader", "reader", "read_text", "read_bytes", "safe_open", "read_table"}
DECODES |= {"load_from_disk", "load_dataset", "from_parquet", "raw_decode", "literal_eval", "load_safetensors"}
PACKAGES = ("mm_cb", "image_attacks")
ELSEWHERE = {
    "mm_cb/attacks/calls.py kept_lines": "copies a behaviours file that read_behaviors has read",
    "mm_cb/attacks/run.py run_attack": "hashes a behaviours file that read_behaviors has read",
    "mm_cb/attacks/transfer.py _batch": "copies pictures; the model comes first",
    "mm_cb/attacks/verify.py _check_counts": "compares what read_results has read; behind the model",
    "mm_cb/benchmarks/llava_wild/judging.py read_rule": "one file alone, known by its hash",
    "mm_cb/benchmarks/llava_wild/judging.py _bytes": "the same file's",
    "mm_cb/cli/data_build.py build_calls": "two texts; tests/data/test_built_calls.py",
    "mm_cb/cli/data_build.py build_pairs": "a text; tests/data/test_pairs.py",
    "mm_cb/core/calls.py json_at": "a model's answer; tests/core/test_calls.py",
    "mm_cb/core/hub.py load_split": "the hub's; tests/core/test_hub.py",
    "mm_cb/core/provenance.py _entry": "the kernel's",
    "mm_cb/core/python_calls.py _worked_out": "a model's answer; tests/core/test_calls.py",
    "mm_cb/models/families.py _fault_of": "names the fault of a folder that was refused; tests/models/test_laws.py",
    "mm_cb/models/known.py _shapes": "ours",
    "mm_cb/real/package.py real_model": "one file alone, known by its hash",
    "image_attacks/transformations.py _through_jpeg": "what Pillow has just written",
    "mm_cb/training/adapter.py save_adapter": "what PEFT has just written",
}
"""Functions that no sample reaches, and why."""


def decoders() -> set[str]:
    """``mm_cb/data/rows.py open_rows`` and the like."""
    found: set[str] = set()

    def walk(node: ast.AST, place: str, names: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = (*names, node.name)
        if isinstance(node, ast.Call) and names:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in DECODES or ast.unparse(node.func) == "Image.open":
                found.add(f"{place} {'.'.join(names)}")
        for child in ast.iter_child_nodes(node):
            walk(child, place, names)

    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        walk(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)), ())
    return found


def called_by_samples() -> list[str]:
    """What the samples call, of a process in which nothing was read and remembered before."""
    called = {}

    def note(frame, event, _):
        if event == "call":
            called[id(frame.f_code)] = frame.f_code  # told apart below: this runs at every call

    for reader in READERS:
        files = sample(reader)
        sys.setprofile(note)
        try:
            attempt(reader, files)
        finally:
            sys.setprofile(None)
    ours = [code for code in called.values() if code.co_filename.startswith(f"{ROOT}/")]
    names = {(code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname.replace(".<locals>", "")) for code in ours}
    return sorted(" ".join(name) for name in names)


@pytest.mark.long  # of our own table
def test_every_decoder_reads_a_sample():
    code = "import json; from tests.fuzz.test_coverage import called_by_samples as c; print('|' + json.dumps(c()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    known, called = decoders(), set(json.loads(done.stdout.rpartition("|")[2]))
    assert not known - called - ELSEWHERE.keys(), "add a sample to tests/fuzz/readers.py"
    assert not ELSEWHERE.keys() - (known - called), "these are read, or are gone"
