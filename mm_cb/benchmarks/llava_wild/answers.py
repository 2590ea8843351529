"""Answers of an earlier run taken over, so that asking another judge does not pay for them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_cb.core.errors import UserError
from mm_cb.core.hub import Repository
from mm_cb.core.records import Run
from mm_cb.core.runs import RunDirectory, read_jsonl, read_run, write_jsonl

_STORE = Path("parts") / "completions.jsonl"
_ASKED = ("benchmark", "model", "adapter", "dtype", "endpoint", "system", "thinking", "questions_sha256")


def take_answers(earlier: Path, run: RunDirectory, weights: Sequence[Path | Repository]) -> None:
    """Copy the answers of ``earlier`` into a run that has none yet.

    Args:
        earlier: A run directory of the same model, questions and length of answers; its judge may be any.
        run: The open run.
        weights: The model's part of the run's inputs.

    Raises:
        UserError: If ``earlier`` is no finished run or this one, asked another model or asked it otherwise.
    """
    names = [weight.name for weight in weights]
    there, here = _asked(read_run(earlier), names), _asked(read_run(run.path), names)
    if differing := [key for key in here if here[key] != there[key]]:
        raise UserError(
            f"`--answers-of` must be a run that asked the same model the same questions; `{earlier}` differs in "
            f"{', '.join(differing)}."
        )
    held = read_run(earlier)
    if not held.get("ended") or earlier.resolve() == run.path.resolve() or not (earlier / _STORE).is_file():
        raise UserError(
            f"`--answers-of` must be another run that came to its end, with its {_STORE}; `{earlier}` is not: finish "
            "it by its own command first."
        )
    if not (run.path / _STORE).is_file():
        run.stage(_STORE.parent.name)
        write_jsonl(run.path / _STORE, read_jsonl(earlier / _STORE))


def _asked(content: Run, weights: Sequence[str]) -> dict[str, object]:
    """What decides a run's answers."""
    recipe, inputs = content["recipe"], content["inputs"]
    found = {key: recipe.get(key) for key in _ASKED}
    settings = recipe.get("settings")
    found["max_new_tokens"] = settings.get("max_new_tokens") if isinstance(settings, dict) else None
    return found | {f"weights {name}": inputs.get(name) for name in weights}
