"""Two real processes, started as a user starts them, train what one process trains."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train
from tests.training.conftest import make_example

if os.environ.get("WORLD_SIZE"):
    import accelerate
    assert accelerate.PartialState(cpu=True).num_processes == 2
    assert torch.distributed.get_backend() == "gloo"
examples = [
    make_example(number, name, image=image)
    for number in range(6) for name in ("circuit_breaker", "retain") for image in (False, True)
]
options = ["circuit_breaker.target_layers=[2]", "lora.layers_to_transform=[1]", "lora.r=4", "lora.dropout=0",
           "training.max_steps=3", "training.batch_size=4", "training.save_steps=2"]
train(load_recipe("miniature", [f"model={sys.argv[1]}", *options]), Path(sys.argv[2]), examples)
"""


def start(command, model_folder, out, **environment):
    script = out.parent / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, *command, str(script), str(model_folder), str(out)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_losses_and_the_adapter_of_one(model_folder, tmp_path, monkeypatch):
    """Up to the order of sums: losses to 1e-4, every matrix of the adapter to 1e-3 (relative, L2)."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    two = start(torchrun, model_folder, tmp_path / "two", ACCELERATE_USE_CPU="true")
    monkeypatch.setattr(sys, "argv", ["script.py", str(model_folder), str(tmp_path / "one")])
    exec(SCRIPT, {})
    one = metrics(tmp_path / "one")
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours["modality"] == theirs["modality"]
        for key in ("step", "reroute_loss", "retain_loss", "reroute_coeff", "retain_coeff"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert theirs.keys() == ours.keys() and any("lora_B" in name for name in ours)
    for name, tensor in ours.items():
        assert tensor.norm() > 0, name
        assert (theirs[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert not (tmp_path / "two" / "checkpoints").exists()
