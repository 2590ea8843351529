"""The scripts in scripts/benchmarks/ run: one step of each on toy shapes, in a process of their own."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "benchmarks"
STEPS = """
import json, runpy, sys
import rr, gpu
from _rr_workload import TINY

counts = {step: rr.flops(TINY, "llava", 2, (42, 42), step) for step in ("official", "strong", "ours")}
timed = rr.time_steps(TINY, "llava", "336-px images", 1)
todo = gpu.parts(gpu.Job(TINY, "cpu", 1, 2, (42, 42), 1e9), [0])
record = {"results": {}}
failed = gpu.run(todo, record, gpu.Path("gpu.json"))
sys.argv = "loading.py --size 64x64 --rows 1 --steps 1 --workers 0".split()
runpy.run_path(rr.__file__.replace("rr.py", "loading.py"), run_name="__main__")
sys.argv = "picture_cache.py --sizes 64x64 --repeats 1".split()
runpy.run_path(rr.__file__.replace("rr.py", "picture_cache.py"), run_name="__main__")
print("\\n" + json.dumps({"counts": counts, "timed": timed, "failed": failed, "todo": list(todo)}))
"""


def top_level_packages(path):
    """The packages that a script imports when it starts, in order."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.name)
def test_what_reads_torchvision_is_imported_behind_the_package_that_mends_it(path):
    order = list(top_level_packages(path))
    for package in {"transformers", "peft", "torchvision"} & set(order):
        assert "mm_cb" in order[: order.index(package)], f"import mm_cb before {package}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-c", STEPS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def test_three_steps_have_one_loss_and_one_gradient_and_three_costs(ran):
    found, _ = ran
    assert found["timed"]["loss_difference"] < 1e-5 and found["timed"]["gradient_difference"] < 1e-4
    assert found["counts"]["official"] > found["counts"]["strong"] > found["counts"]["ours"] > 0


def test_every_part_for_a_gpu_runs_or_says_what_is_not_installed(ran):
    found, kept = ran
    assert found["failed"] == 0 and list(kept["results"]) == found["todo"]
    missing = {name: result["not_installed"] for name, result in kept["results"].items() if "not_installed" in result}
    assert set(missing.values()) <= {"bitsandbytes", "flash_attn"}
    for name in kept["results"].keys() - missing.keys():
        assert {"seconds", "gemm_tflops"} & kept["results"][name].keys(), name
