"""Both benchmarks run where little is installed beside torch and transformers; the attack's counts are what it says."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.runner import to_pixels
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from tests.tiny_llava import picture, tiny_llava

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory):
    """What both benchmarks print at toy sizes where little is installed, and the file of the one for a GPU."""
    blocked = ("datasets", "typer", "rich", "matplotlib", "torchvision")
    scripts, out = ROOT / "scripts" / "benchmarks", tmp_path_factory.mktemp("gpu") / "gpu.json"
    code = f"""
import runpy, sys
sys.modules |= dict.fromkeys({blocked})
sys.path.insert(0, {str(scripts)!r})
for script, *words in (
    ["gpu.py", "--tiny", "--steps", "2", "--rows", "2", "--json", {str(out)!r}], ["pgd.py", "--tiny", "--json"]
):
    print("of", script)
    sys.argv = [script, *words]
    try:
        runpy.run_path({str(scripts)!r} + "/" + script, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    gpu, pgd = done.stdout.removeprefix("of gpu.py").split("of pgd.py")
    return gpu, json.loads(pgd), out


@pytest.mark.slow
@pytest.mark.long  # of our own scripts, in a process of their own
def test_the_gpu_benchmark_runs_tiny_on_a_cpu(without_extras):
    printed, _, file = without_extras
    assert (
        "ours {'seconds'" in printed and "official {'seconds'" in printed and file.is_file() and "failed" not in printed
    )


@pytest.mark.slow
@pytest.mark.long
def test_toy_sizes_on_the_cpu_give_equal_losses_and_fewer_flops(benchmark, without_extras):
    _, record, _ = without_extras
    for setting in ("one_image_each", "one_image_for_all"):
        assert record[setting]["loss_difference"] < 1e-5 and record[setting]["gradient_difference"] < 1e-4
        assert record[setting]["flops_share"] < 0.95
    assert record["goals"]["same losses and gradients"]
    without_running, each = record["one_image_each_at_7b"], record["one_image_each"]  # both at toy sizes here
    for name in ("usual", "ours"):
        count = each["behaviours"] * 1e3 * without_running[f"tflops_{name}"]
        assert count == pytest.approx(each[f"gflops_{name}"], rel=1e-3)
    timed = benchmark.on_gpu(benchmark.TINY, "cpu", [1, 2], 1)
    assert timed["ours_batch_2"]["ms_per_step_and_behaviour"] > 0 and timed["usual_batch_1"]["mfu"] > 0


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_pgd", ROOT / "scripts" / "benchmarks" / "pgd.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_pgd"] = module
    spec.loader.exec_module(module)
    return module


def test_the_counter_counts_forward_and_backward_products(benchmark):
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with benchmark.FlopCount() as counter:
        torch.autograd.grad((a @ b).sum(), a)
    assert counter.total == 2 * 2 * 3 * 4 * 5


def test_the_step_that_is_measured_is_that_of_the_runner(benchmark):
    model = tiny_llava()
    behaviors = [Behavior("a", "what is in the picture", "a red circle", None)] * 2
    pictures = [picture(seed, (42, 42)) for seed in range(2)]
    objective = TargetObjective(Subject("base", model), behaviors, pictures)
    length = int(objective.inputs.completion_mask.sum(1)[0])
    prompts, targets = zip(*((row[:-length], row[-length:]) for row in objective.inputs.input_ids), strict=True)
    pixels = torch.stack([to_pixels(p) for p in pictures]).requires_grad_()
    with benchmark.FlopCount() as runner:
        losses = objective(pixels)
        torch.autograd.grad(losses.sum(), pixels)
    pixel_values = objective.preprocess(pixels).detach()
    with benchmark.FlopCount() as measured:
        found, _ = benchmark.our_step(model.base, prompts, targets, pixel_values)
    torch.testing.assert_close(found, losses.detach())
    with benchmark.FlopCount() as processor:
        torch.autograd.grad(objective.preprocess(pixels).sum(), pixels)
    assert 0 < measured.total == runner.total - processor.total


@pytest.mark.slow
@pytest.mark.parametrize("narrower", [4, pytest.param(1, marks=pytest.mark.long)])
def test_flop_goals_are_met_at_the_documented_sizes(benchmark, narrower):
    """By default run at a quarter of the widths, and counted at the whole ones too."""
    text, vision = (
        {
            key: value // narrower if key in ("hidden_size", "intermediate_size") else value
            for key, value in part.items()
        }
        for part in (benchmark.MINI.text, benchmark.MINI.vision)
    )
    shape = dataclasses.replace(benchmark.MINI, text=text, vision=vision)
    record = benchmark.on_cpu(shape, benchmark.MINI, repeats=0)
    assert max(record[name]["flops_share"] for name in ("one_image_each", "one_image_each_at_7b")) <= 0.92
    assert record["one_image_for_all"]["fewer"] >= 6
    assert all(record["goals"].values())
