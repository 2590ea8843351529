"""Settings of benchmarks: dataclasses whose fields say what they are, for Python, flags and a run's identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_cb.core.errors import unknown
from mm_cb.core.limits import LIMITS, Limit, settle


def setting(
    default: Any,
    about: str,
    *,
    least: float | None = None,
    most: float = 1e9,
    why: str = "no benchmark needs more",
    choices: Sequence[str] = (),
    identity: bool = True,
    metavar: str = "",
    many: bool = False,
) -> Any:
    """A field of a settings class, which is also a flag of the command: ``max_new_tokens`` is ``--max-new-tokens``.

    Args:
        default: Its type decides how a text is read: int, float, bool (a switch), tuple (comma-separated), or text.
        about: One line for ``--help``.
        least: Smallest number that is accepted; 0 if nothing is said.
        most: Largest one.
        why: Why no more than that, for the error line.
        choices: The texts that are accepted, if not any.
        identity: Whether the results depend on it; if not, a run may be gone on with under another value.
        metavar: What stands behind the flag in ``--help``; by default a word for the type.
        many: The flag may be given several times, one value each.
    """
    number = isinstance(default, int | float) and not isinstance(default, bool)
    limit = Limit(least or 0, most, why, whole=isinstance(default, int)) if number else None
    return setting_within(limit, default, about, choices=choices, identity=identity, metavar=metavar, many=many)


def setting_within(limit: Limit | None, default: Any, about: str, **more: Any) -> Any:
    """A `setting` that is a number within a limit, or, where the default is None, perhaps nothing."""
    about_it = {"choices": (), "identity": True, "metavar": "", "many": False, **more}
    return dataclasses.field(default=default, metadata={"about": about, "limit": limit, **about_it})


@dataclass(frozen=True)
class Settings:
    """What can be set; checked when it is made."""

    def __post_init__(self) -> None:
        """Check every field by what it says about itself.

        Raises:
            UserError: If a number is out of range or a text is none of the choices.
        """
        for field in dataclasses.fields(self):
            value, about = getattr(self, field.name), field.metadata
            if (limit := about.get("limit")) is not None and not (value is None and field.default is None):
                settle(self, field.name, limit)
            if about.get("choices") and value not in about["choices"]:
                raise unknown(field.name.replace("_", " "), value, about["choices"])

    def identity(self) -> dict[str, object]:
        """What belongs to a run's identity."""
        kept = [field.name for field in dataclasses.fields(self) if field.metadata.get("identity", True)]
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True)
class AskSettings(Settings):
    """How a model is asked."""

    max_new_tokens: int = setting_within(LIMITS["max_new_tokens"], 128, "Longest answer, in tokens.")
    limit: int | None = setting_within(
        LIMITS["limit"], None, "First so many questions, for a trial.  [default: all]", metavar="N"
    )
    batch: int = setting_within(
        LIMITS["batch"], 8, "Questions answered at once, or requests under way at an endpoint.", identity=False
    )

    def identity(self) -> dict[str, object]:
        """As of all settings; in files, 0 stands for all questions."""
        return super().identity() | {"limit": self.limit or 0}


@dataclass(frozen=True)
class StoredAnswers(Settings):
    """Answers that somebody else's program wrote."""

    answers: str = setting("", "Stored answers: JSON lines of `id` and `completion`.", metavar="FILE")
