"""Names of devices."""

import re

from mm_cb.core.errors import UserError

_NAMES = re.compile(r"cpu|auto|cuda(:(0|[1-9][0-9]{0,2}))?")


def refuse_unknown(device: str) -> None:
    """Refuse what is the name of no device, on any machine.

    Raises:
        UserError: Saying which there are.
    """
    if not _NAMES.fullmatch(device):
        raise UserError(f"the device must be cpu, cuda, cuda:N or auto, got {device!r:.80}.")


def refuse_absent(device: str) -> None:
    """Refuse a device that torch does not see here.

    Raises:
        UserError: If it has another name than devices have, or is none of this machine's.
    """
    import torch

    refuse_unknown(device)
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"the device is `{device}`, but torch sees {torch.cuda.device_count()} GPUs; use cpu or another machine."
        )
