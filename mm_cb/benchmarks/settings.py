"""Settings of benchmarks: dataclasses whose fields say what they are, for Python, flags and a run's identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_cb.core.errors import UserError, unknown


def setting(
    default: Any,
    about: str,
    *,
    least: int | None = None,
    choices: Sequence[str] = (),
    identity: bool = True,
    metavar: str = "",
    many: bool = False,
) -> Any:
    """A field of a settings class, which is also a flag of the command: ``max_new_tokens`` is ``--max-new-tokens``.

    Args:
        default: Its type decides how a text is read: int, float, bool (a switch), tuple (comma-separated), or text.
        about: One line for ``--help``.
        least: Smallest number that is accepted.
        choices: The texts that are accepted, if not any.
        identity: Whether the results depend on it; if not, a run may be gone on with under another value.
        metavar: What stands behind the flag in ``--help``; by default a word for the type.
        many: The flag may be given several times, one value each.
    """
    about_it = {"about": about, "least": least, "choices": tuple(choices), "identity": identity}
    return dataclasses.field(default=default, metadata={**about_it, "metavar": metavar, "many": many})


@dataclass(frozen=True)
class Settings:
    """What can be set; checked when it is made."""

    def __post_init__(self) -> None:
        """Check every field by what it says about itself.

        Raises:
            UserError: If a number is too small or a text is none of the choices.
        """
        for field in dataclasses.fields(self):
            value, about = getattr(self, field.name), field.metadata
            if about.get("least") is not None and value < about["least"]:
                raise UserError(f"`{field.name}` must be at least {about['least']}, got {value}.")
            if about.get("choices") and value not in about["choices"]:
                raise unknown(field.name.replace("_", " "), value, about["choices"])

    def identity(self) -> dict[str, object]:
        """What belongs to a run's identity."""
        kept = [field.name for field in dataclasses.fields(self) if field.metadata.get("identity", True)]
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True)
class AskSettings(Settings):
    """How a model is asked."""

    max_new_tokens: int = setting(128, "Longest answer, in tokens.", least=1)
    limit: int = setting(0, "First so many questions, for a trial; 0 = all.")
    batch: int = setting(
        8, "Questions answered at once, or requests under way at an endpoint.", least=1, identity=False
    )


@dataclass(frozen=True)
class StoredAnswers(Settings):
    """Answers that somebody else's program wrote."""

    answers: str = setting("", "Stored answers: JSON lines of `id` and `completion`.", metavar="FILE")
