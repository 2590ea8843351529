"""Numbers that launchers put into the environment."""

import os

from mm_cb.core.errors import UserError


def launched(name: str, default: int) -> int:
    """A launcher's number, such as ``WORLD_SIZE``; ``default`` where nobody set it.

    Raises:
        UserError: If it is no number from 0 on.
    """
    told = os.environ.get(name, str(default))
    if not (told.isdecimal() and told.isascii()):
        raise UserError(f"{name} of the environment must be a launcher's number, got `{told}`; unset it.")
    return int(told)
