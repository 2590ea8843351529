"""Search a suffix for every behaviour with nanogcg, for models of text alone, and write them as a prompts file.

    pip install -e '.[nanogcg]'
    python scripts/nanogcg_prompts.py --model M [--adapter DIR] --behaviors F --out prompts.jsonl
        [--steps 250] [--width 512] [--seed 0] [--device cuda] [--dtype bfloat16]
    mm-cb attack --model M [--adapter DIR] --behaviors F --attack imported --prompts prompts.jsonl --out DIR

A line is written as soon as its behaviour is done: stopped at any time, the same command goes on. Each search starts
from the seed anew, so that a file that was gone on with is the one that was never stopped.
"""

import argparse
import importlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mm_cb  # noqa: F401  (before transformers: it mends torchvision)
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import append_jsonl, read_jsonl
from mm_cb.core.records import JsonObject
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.data.prompts_file import messages_hash

EXTRA = "pip install -e '.[nanogcg]'"
PLACE = "{optim_str}"
"""Where nanogcg puts its suffix."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what is not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--behaviors", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the prompts file")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--width", type=int, default=512, help="suffixes weighed at a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    try:
        write_prompts(parser.parse_args(arguments))
    except UserError as error:
        print(f"nanogcg_prompts: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def write_prompts(options: Namespace) -> None:
    """Append a line for every behaviour that has none.

    Raises:
        UserError: If nanogcg is not installed, a number is too low, a file is missing or broken, the model sees
            pictures, the prompts file is of other settings, or nanogcg finds nothing that can be sent.
    """
    for flag, least in (("steps", 1), ("width", 1), ("seed", 0)):
        if (given := getattr(options, flag)) < least:
            raise UserError(f"`--{flag}` must be a whole number from {least}, got {given}.")
    nanogcg = _imported()
    behaviors = read_behaviors(options.behaviors)
    for one in behaviors:
        _refuse(one)
    source = _source(options)
    done = {record["id"] for record in _written(options.out, source)}
    waiting = [one for one in behaviors if one.id not in done]
    model = _text_model(options) if waiting else None
    config = nanogcg.GCGConfig(
        num_steps=options.steps,
        search_width=options.width,
        seed=options.seed,
        use_prefix_cache=False,  # it indexes the cache, which transformers 5 does not allow
        verbosity="ERROR",
    )
    for one in waiting:
        messages = [{"role": "user", "content": _prompt(nanogcg, model, one, config)}]
        line = {"id": one.id, "messages": messages, "source": source, "hash": messages_hash(messages)}
        append_jsonl(options.out, line)
    print(f"{options.out}: {len(behaviors)} prompts, {len(waiting)} of them new")


def _imported() -> Any:
    try:
        return importlib.import_module("nanogcg")
    except ImportError as error:
        raise UserError(f"nanogcg is not installed; it is the `nanogcg` extra: {EXTRA}.") from error


def _refuse(behavior: Behavior) -> None:
    """Refuse what nanogcg cannot search for."""
    if behavior.image is not None:
        raise UserError(f"{behavior.named} must have no `image`: nanogcg is for models of text alone.")
    if not behavior.target:
        raise UserError(f"{behavior.named} must have a `target` that is a text: nanogcg knows no calls.")
    if PLACE in behavior.prompt:
        raise UserError(f"{behavior.named} must not have `{PLACE}` in its prompt: nanogcg puts its suffix there.")


def _source(options: Namespace) -> str:
    against = options.model if options.adapter is None else f"{options.model} with {options.adapter}"
    return f"nanogcg, {options.steps} steps of {options.width}, seed {options.seed}, {options.dtype}, against {against}"


def _written(path: Path, source: str) -> list[JsonObject]:
    """The lines that are there, all of them of the same settings."""
    records = read_jsonl(path)
    for record in records:
        if record.get("source") != source or "id" not in record:
            raise UserError(
                f"`{path}` must hold prompts of `{source}`, it has some of `{record.get('source')}`: give another "
                "`--out`, or the settings that it was made with."
            )
    return records


def _text_model(options: Namespace) -> Any:
    from mm_cb.models import VisionModel, load_model
    from mm_cb.models.families import read_config
    from mm_cb.models.registry import family_of

    if issubclass(family_of(read_config(options.model), options.model), VisionModel):
        raise UserError(f"`{options.model}` sees pictures; nanogcg is for models of text alone.")
    return load_model(options.model, adapter=options.adapter, device=options.device, dtype=options.dtype)


def _prompt(nanogcg: Any, model: Any, behavior: Behavior, config: Any) -> str:
    """The behaviour's prompt with the best suffix that spells no control token, which `mm-cb attack` would refuse."""
    from mm_cb.models.chat import control_token

    content, tokenizer = f"{behavior.prompt} {PLACE}", model.processor.tokenizer
    try:
        found = nanogcg.run(model.model, tokenizer, [{"role": "user", "content": content}], behavior.target, config)
    except RuntimeError as error:
        if "after decoding and re-encoding" not in str(error):
            raise
        raise UserError(
            f"{behavior.named}: nanogcg found no suffix that the tokenizer of `{model.name}` reads as it was written."
        ) from error
    for _, suffix in sorted(zip(found.losses, found.strings, strict=True), key=lambda one: one[0]):
        if control_token(suffix, tokenizer) is None:
            return content.replace(PLACE, suffix)
    raise UserError(f"{behavior.named}: every suffix of nanogcg spells a control token; take another `--seed`.")


if __name__ == "__main__":
    sys.exit(main())
