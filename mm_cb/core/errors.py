"""Errors that the user can fix, each one line: what was expected, what came, what to do."""

import difflib
from collections.abc import Iterable

_LISTED = 30
LONGEST = 1200
"""Characters of a message: what it quotes may be of any length."""
_END = 300

_OTHER_NAMES = {
    "r": ("rank", "lora_r", "lora_rank"),
    "dropout": ("lora_dropout",),
    "modules": ("target_modules",),
    "layers_to_transform": ("lora_layers", "transform_layers"),
    "target_layers": ("layers", "layer"),
    "learning_rate": ("lr", "learningrate", "rate"),
    "max_steps": ("steps", "epochs", "epoch", "num_epochs", "num_train_epochs", "num_steps"),
    "batch_size": ("batch", "per_device_train_batch_size", "train_batch_size"),
    "batch": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation", "accumulation_steps", "grad_accum", "gradient_accumulation"),
    "lr_scheduler_type": ("scheduler", "lr_scheduler", "schedule"),
    "max_grad_norm": ("clip", "grad_clip", "gradient_clipping", "grad_norm"),
    "max_length": ("max_seq_length", "max_seq_len", "seq_len", "context"),
    "recompute": ("gradient_checkpointing", "checkpointing"),
    "dataloader_num_workers": ("workers", "num_workers"),
    "picture_cache": ("cache", "cache_dir", "cache_images", "cache_pictures"),
    "dtype": ("bf16", "fp16", "precision", "torch_dtype"),
    "quantize": ("load_in_4bit", "quantization", "bits"),
    "attention": ("attn", "attn_implementation"),
    "data": ("dataset", "datasets", "train_file", "train_data"),
    "model": ("base", "base_model", "model_name", "model_name_or_path"),
    "epsilon": ("eps",),
}
"""Names of settings → what they are called elsewhere."""


class UserError(Exception):
    """Something the user can put right: the command line prints it as one line and exits with code 2.

    The message is folded to one line, stripped of control characters and cut, because it often quotes file names, keys
    or file contents that we did not write.
    """

    def __init__(self, message: str) -> None:
        """Keep ``message`` as one printable line."""
        super().__init__(message_line(message))


def message_line(text: str) -> str:
    """A message as one line; of one that is longer than `LONGEST`, beginning and end, which says what to do."""
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _END - 5]} ... {line[-_END:]}"


def one_line(text: str) -> str:
    r"""Fold white space to single blanks and put ``?`` for control characters: ``"a\n\x1b[2J"`` -> ``"a ?[2J"``."""
    folded = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in folded)


def called(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names of what is called ``name`` elsewhere, or by its first letters: ``lr`` for ``learning_rate``."""
    said = _last(name)
    return [
        one
        for one in valid
        for last in [_last(one)]
        if said in _OTHER_NAMES.get(last, ()) or (len(said) > 1 and said == "".join(w[:1] for w in last.split("_")))
    ]


def _last(name: str) -> str:
    """``--Learning-Rate`` and ``training.learning_rate`` as ``learning_rate``."""
    return name.rpartition(".")[2].strip("-").replace("-", "_").lower()


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that ``name`` stands for or looks most like, or None if none is as alike as ``cutoff`` (0..1)."""
    valid = list(valid)
    if stands_for := called(name, valid):
        return stands_for[0]
    by_lower = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a list: ``unknown recipe `gpt3`, did you mean `gpt2`? valid: ...``.

    Args:
        kind: What is being named, for example ``"recipe"`` or ``"recipe key"``.
        name: What the user wrote.
        valid: All names that would have been accepted.

    Returns:
        The error, for the caller to raise.
    """
    names = sorted(valid)
    close = nearest(name, names)
    hint = f", did you mean `{close}`?" if close else "."
    listed = ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return UserError(f"unknown {kind} `{name}`{hint} valid: {listed or 'none'}")
