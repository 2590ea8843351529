"""Two real processes, with what a launcher sets for them, train what one process trains."""

import json
import multiprocessing
import os
import socket
from typing import get_args

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mm_cb.training.losses import RetainAverage
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train

OPTIONS = ["circuit_breaker.target_layers=[2]", "lora.layers_to_transform=[1]", "lora.r=4", "lora.dropout=0"]
OPTIONS += ["training.start_distance=0"]  # each process would find its own B from its rows
OPTIONS += ["training.max_steps=3", "training.batch_size=4", "training.save_steps=2"]


def trained(model_folder, examples, average, out):
    options = [f"model={model_folder}", f"circuit_breaker.retain_average={average}", *OPTIONS]
    train(load_recipe("miniature", options), out, examples)


def trained_as(rank, port, *arguments):
    """In a process that was forked off, so that it need not import torch again: with the variables of ``torchrun``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)  # what tests before this one left
    assert accelerate.PartialState(cpu=True).num_processes == 2
    assert torch.distributed.get_backend() == "gloo"
    trained(*arguments)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("average", get_args(RetainAverage))
def test_two_processes_give_the_losses_and_the_adapter_of_one(average, model_folder, examples, tmp_path):
    """Up to the order of sums: losses to 1e-4, every matrix of the adapter to 1e-3 (relative, L2)."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    given = (port, model_folder, examples, average, tmp_path / "two")
    processes = [fork.Process(target=trained_as, args=(rank, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()  # one that waits for another that died
    assert [process.exitcode for process in processes] == [0, 0]
    trained(model_folder, examples, average, tmp_path / "one")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
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
