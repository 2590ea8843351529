"""The shipped launch files can be read by what they are for; only DDP has been run (test_ddp.py)."""

import subprocess
import warnings
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from mm_cb.training.launch import warn_of_missing_processes

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name] and config.num_processes == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_what_was_never_run_says_so(name):
    assert "UNTESTED" in (LAUNCH / f"{name}.yaml").read_text()


def test_the_slurm_script_is_a_shell_script():
    subprocess.run(["bash", "-n", str(LAUNCH / "train.slurm")], check=True)


@pytest.mark.parametrize(
    ("environment", "held", "told"),
    [
        ({}, 1, ""),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            1,
            "more than one process (accelerate launch), but only 1 trains",
        ),
        ({"ACCELERATE_USE_CPU": "True"}, 1, ""),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "h", "WORLD_SIZE": "2"}, 2, ""),
        ({"WORLD_SIZE": "4"}, 1, "4 processes (WORLD_SIZE)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "2 processes (OMPI_COMM_WORLD_SIZE)"),
        ({"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "1"}, 1, "8 processes (SLURM_STEP_NUM_TASKS)"),
    ],
)
def test_fewer_processes_than_were_asked_for_are_told(environment, held, told):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_missing_processes(environment, held)
    assert [told in str(one.message) for one in said] == ([True] if told else [])
