"""Decoding: greedy or the whole distribution, as the caller says, whatever a model's folder holds."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields as declared
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PretrainedConfig

from mm_cb.core.errors import UserError
from mm_cb.core.reading import is_there, json_file
from mm_cb.core.thoughts import MARKS, AnswerText, has_thought
from mm_cb.models.laws import CONFIG

FILE = "generation_config.json"
_READ = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
_NEUTRAL: Mapping[str, Any] = {
    **{"use_cache": True, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1},
    **{"temperature": 1, "top_p": 1, "typical_p": 1, "repetition_penalty": 1, "length_penalty": 1},
}
"""Values that change nothing."""
_WRITTEN: Mapping[str, Any] = {"max_length": 20, "top_k": 50, "encoder_repetition_penalty": 1}
"""Values that older versions of transformers wrote into every config.json, beside zeros."""


def generation_config(folder: Path, config: Any) -> GenerationConfig | None:
    """What of a folder's generation_config.json counts here, its end tokens; None where it has no such file.

    Everything else in it is left out, and so is what the configuration says of decoding; both are named once.

    Raises:
        UserError: If it is no JSON object, or its end tokens are no token ids.
    """
    if strays := _strays(folder, config):
        _name_ignored(folder / CONFIG, "no setting of decoding is read", tuple(sorted(strays)))
    file = folder / FILE
    if not is_there(file):
        return None
    fields = json_file(file, dict, "a JSON object")
    ends = fields.get("eos_token_id")
    ids = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in ids):
        raise UserError(f"`{file}`: `eos_token_id` must be a token id or a list of them, got {ends!r:.80}.")
    ignored = [name for name, value in fields.items() if _matters(name, value)]
    if ignored:
        _name_ignored(file, "only the end tokens are read", tuple(sorted(ignored)))
    return GenerationConfig(eos_token_id=ids or None)


def _matters(name: str, value: Any) -> bool:
    """Whether a field would change what a model says."""
    plain = value is None or value is False or value in ([], {}, "") or value == _NEUTRAL.get(name, object())
    return not (plain or name.startswith("_") or name in _READ)


def _strays(folder: Path, config: Any) -> set[str]:
    """Settings of decoding in a folder's config.json that are no fields of such a configuration."""
    text = config.get_text_config()
    own = {field.name for part in (config, text) if is_dataclass(part) for field in declared(part)}
    names = {name for name in GenerationConfig().to_dict().keys() - own if not name.startswith("output_")}
    held, _ = PretrainedConfig.get_config_dict(folder)
    parts = [part for part in (held, held.get("text_config")) if isinstance(part, dict)]
    said = [(name, part[name]) for part in parts for name in names & part.keys()]
    return {name for name, value in said if _matters(name, value) and value not in (0, _WRITTEN.get(name, 0))}


@cache
def _name_ignored(file: Path, read: str, names: tuple[str, ...]) -> None:
    """Say it once a file."""
    warnings.warn(
        f"of `{file}` {read}; ignored: {', '.join(names)}. Answers are greedy, or drawn from the whole distribution "
        "where a command says so.",
        stacklevel=2,
    )


def end_tokens(model: Any, tokenizer: Any, more: Iterable[int | None] = ()) -> list[int]:
    """Ids of all tokens that end an answer: the tokenizer's, those of the model's generation config, and ``more``."""
    held = getattr(_base(model).generation_config, "eos_token_id", None)
    ids = [] if held is None else torch.as_tensor(held).reshape(-1).tolist()
    known = _base(model).config.get_text_config().vocab_size
    if beyond := [token for token in ids if not 0 <= token < known]:
        raise UserError(
            f"`eos_token_id` of generation_config.json of `{_base(model).config.name_or_path}` must hold tokens below "
            f"its vocabulary of {known}, got {beyond[0]}."
        )
    return sorted({*ids, tokenizer.eos_token_id, *more} - {None})


def decode(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    ends: Collection[int],
    temperature: float | None = None,
) -> list[str]:
    """As `decode_ids`, as one text a row, see `texts_of`."""
    rows = decode_ids(model, tokenizer, inputs, max_new_tokens, ends, temperature)
    return texts_of(tokenizer, rows, max_new_tokens)


def texts_of(tokenizer: Any, rows: Sequence[Sequence[int]], limit: int | None = None) -> list[str]:
    """Token ids as texts, without special tokens but for marks of a thought, which is not to run into the answer.

    A row of ``limit`` tokens, the longest that was asked for, says so: see `mm_cb.core.thoughts.ends_at_limit`.
    """
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    special = {
        id: token.content for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    marks = {id for id, token in special.items() if token in MARKS}
    for number, row in enumerate(rows if marks else ()):
        if marks.intersection(row):
            marked = tokenizer.decode([id for id in row if id in marks or id not in special])
            texts[number] = marked if has_thought(marked) else texts[number]
    return [
        AnswerText(text, at_limit=True) if limit is not None and len(row) >= limit else text
        for text, row in zip(texts, rows, strict=True)
    ]


@torch.no_grad()
def decode_ids(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    ends: Collection[int],
    temperature: float | None = None,
) -> list[list[int]]:
    """Completions of a batch by these settings alone: the model's own are out of the way meanwhile.

    Args:
        model: A transformers model, or the ``PeftModel`` around it.
        tokenizer: Its tokenizer, with a padding token.
        inputs: The model's inputs, padded on the left.
        max_new_tokens: Longest completion.
        ends: Tokens at which a completion ends.
        temperature: Draw every token from the whole distribution at this temperature, with torch's global random
            state; None = greedy.

    Returns:
        Token ids of every row, without the one that ends it.

    Raises:
        UserError: If the model's positions are learned, and a row with its longest answer needs more of them.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        **({} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}),
        eos_token_id=list(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = _base(model)
    _refuse_no_room(base, int(inputs["attention_mask"].sum(dim=1).max()), max_new_tokens)
    held, base.generation_config = base.generation_config, GenerationConfig()
    try:
        tokens = model.generate(**inputs, generation_config=config)
    finally:
        base.generation_config = held
    asked = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    rows = tokens[:, asked:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def positions_of(model: Any) -> int | None:
    """How many tokens a row of this transformers model may have; None where nothing says so."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def learned_positions(model: Any) -> int | None:
    """How many tokens a row of this transformers model cannot go beyond; None where positions are computed."""
    return None if hasattr(model.get_decoder(), "rotary_emb") else positions_of(model)


def _refuse_no_room(base: Any, tokens: int, new: int) -> None:
    limit = learned_positions(base)
    if limit is None or tokens + new - 1 <= limit:
        return
    raise UserError(
        f"`{base.config.name_or_path}` has {limit} positions: a prompt of {tokens} tokens with an answer of up to "
        f"{new} needs more; shorten the prompt, or give `--max-new-tokens {max(1, limit - tokens + 1)}` or less."
    )


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
