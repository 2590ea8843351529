"""Processes that a launcher was asked for, against those that it started."""

import warnings
from collections.abc import Mapping

_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def warn_of_missing_processes(environment: Mapping[str, str], held: int) -> None:
    """Warn where fewer processes train together than were asked for: each would train the whole run by itself.

    ``accelerate launch --cpu --num_processes 2`` without ``--multi_cpu`` starts one process and says nothing. It leaves
    an address to meet at and no number.

    Args:
        environment: Of this process.
        held: Processes that train together, as torch.distributed knows them.
    """
    found = [(int(environment[name]), name) for name in _COUNTS if environment.get(name, "").isdecimal()]
    asked, name = max(found, default=(1, ""))
    told = f"{asked} processes ({name})"
    by_accelerate = any(key.startswith("ACCELERATE_") for key in environment)
    if not found and by_accelerate and "MASTER_ADDR" in environment:
        asked, told = max(asked, held + 1), "more than one process (accelerate launch)"
    if asked > held:
        warnings.warn(
            f"the launcher was asked for {told}, but only {held} trains here: on CPUs use `accelerate launch "
            "--cpu --multi_cpu --num_processes N` or `torchrun --nproc_per_node N`.",
            stacklevel=2,
        )
