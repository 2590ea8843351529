"""What the numbers of a model's folder must be to one another: one table for all families, checked before any weight.

transformers takes most of these as they come: another model runs, or something fails far from the file at fault.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from mm_cb.core.errors import UserError

CONFIG, PROCESSOR = "config.json", "processor_config.json"
OLD_PROCESSOR = "preprocessor_config.json"
_PARTS = ("text_config", "vision_config")
_STORED = ("quantization_config", "compression_config")
_MOST_TOKENS = 16384
"""Of one picture; no published image processor goes beyond it."""
_BEYOND = 4
"""Times as many numbers as all weights have, where some of them may be missing, which is told in other words."""
_MOST_BLOCKS = 1000
"""Of one tower; published models have up to 126."""
_MOST_TILES = 100
"""Of one picture; published models have up to 36."""


class _Numbers(NamedTuple):
    """What others are held against; None = not known."""

    vocabulary: int | None = None
    sees: int | None = None
    """Blocks of the image tower."""
    angles: int | None = None
    """Rotary angles of a head."""


_Law = Callable[[Any, _Numbers], str | None]
"""What a value must be, or None if it is that."""


def _size(value: Any, numbers: _Numbers) -> str | None:
    fine = all(_whole(one) and one >= 1 for one in _listed(value))  # some families have one a block
    return None if fine else "a whole number from 1 on"


def _depth(value: Any, numbers: _Numbers) -> str | None:
    return None if _whole(value) and 1 <= value <= _MOST_BLOCKS else f"a whole number from 1 to {_MOST_BLOCKS}"


def _positive(value: Any, numbers: _Numbers) -> str | None:
    return None if _real(value) and value > 0 else "a number above 0"


def _token(value: Any, numbers: _Numbers) -> str | None:
    return _within(value, 0, numbers.vocabulary, "tokens of the model (`vocab_size`)")


def _tokens(value: Any, numbers: _Numbers) -> str | None:
    return next((fault for one in _listed(value) if (fault := _token(one, numbers))), None)


def _padding(value: Any, numbers: _Numbers) -> str | None:
    return None if value == -1 and _whole(value) else _token(value, numbers)  # older folders write -1 for none


def _blocks(value: Any, numbers: _Numbers) -> str | None:
    places = _listed(value)
    wrong = (_within(one, 0, numbers.sees, "blocks of the image tower") for one in places)
    return next(filter(None, wrong), None)


def _states(value: Any, numbers: _Numbers) -> str | None:
    """One of the image tower's hidden states, or several: its embeddings and every block's output."""
    if not (places := _listed(value)):
        return "at least one of the image tower's hidden states"
    states = None if numbers.sees is None else numbers.sees + 1
    wrong = (_within(one, None if states is None else -states, states, "the image tower's states") for one in places)
    return next(filter(None, wrong), None)


def _sections(value: Any, numbers: _Numbers) -> str | None:
    """Rotary angles for time, rows and columns."""
    if not isinstance(value, list) or len(value) != 3 or not all(_whole(one) and one >= 0 for one in value):
        return "three whole numbers, of angles for time, row and column"
    if numbers.angles is not None and sum(value) != numbers.angles:
        return f"three numbers that make {numbers.angles}, half of what is turned of a head"
    return None


def _activation(value: Any, numbers: _Numbers) -> str | None:
    from transformers.activations import ACT2FN

    return None if isinstance(value, str) and value in ACT2FN else "an activation that transformers knows"


def _dtype(value: Any, numbers: _Numbers) -> str | None:
    import torch

    found = getattr(torch, str(value).removeprefix("torch."), None)
    return None if isinstance(found, torch.dtype) and found.is_floating_point else "a floating-point dtype"


_LAWS: Mapping[str, _Law] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"), _size),
    **dict.fromkeys(("num_hidden_layers", "depth"), _depth),
    **dict.fromkeys(("num_key_value_heads", "max_position_embeddings"), _size),
    **dict.fromkeys(("num_heads", "embed_dim", "image_size", "patch_size", "num_channels"), _size),
    **dict.fromkeys(("in_channels", "out_hidden_size", "spatial_merge_size", "temporal_patch_size"), _size),
    **dict.fromkeys(("window_size", "num_position_embeddings", "sliding_window", "scale_factor"), _size),
    **dict.fromkeys(("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"), _size),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), _size),
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), _token),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), _tokens),
    "pad_token_id": _padding,
    "vision_feature_layer": _states,
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), _blocks),
    "mrope_section": _sections,
    "rope_theta": _positive,
}
"""Every number of a config.json that must fit another, under transformers' common name."""
_WORDS: Mapping[str, _Law] = {
    **dict.fromkeys(("hidden_act", "activation_function"), _activation),
    **dict.fromkeys(("dtype", "torch_dtype"), _dtype),
}


def check_kinds(held: Mapping[str, Any], name: str) -> None:
    """Refuse a config.json as it lies there whose numbers are none, or whose weights are not plain floats.

    Raises:
        UserError: Naming the field.
    """
    for where, part in (("", held), *((f"{name}.", held.get(name)) for name in _PARTS)):
        if not isinstance(part, dict):
            continue
        for field in _STORED:
            if part.get(field):
                method = part[field].get("quant_method") if isinstance(part[field], dict) else part[field]
                raise UserError(
                    f"{_file(name)} must describe plain floating-point weights, its `{where}{field}` says "
                    f"{method!r:.60}: stored quantised weights are not read; take the full-precision model, with "
                    "`quantize: 4bit` where memory is short."
                )
        _hold(where, part, _Numbers(), name, {**_LAWS, **_WORDS})


def check_config(config: Any, name: str) -> None:
    """Refuse a configuration whose numbers do not fit one another.

    Raises:
        UserError: Naming the field.
    """
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    sees = next((getattr(vision, f) for f in ("num_hidden_layers", "depth") if hasattr(vision, f)), None)
    numbers = _Numbers(getattr(text, "vocab_size", None), sees, _angles(text))
    parts = {"": config, "text_config.": text if text is not config else None, "vision_config.": vision}
    for where, part in parts.items():
        if part is None:
            continue
        names = getattr(type(part), "attribute_map", {})
        laws = {names.get(field, field): law for field, law in _LAWS.items()}
        if part is config is not text:
            laws.pop("pad_token_id")  # the language tower's own is read; here it may be that of another tokenizer
        _hold(where, {field: _value(part, field) for field in laws}, numbers, name, laws)
        if isinstance(rope := getattr(part, "rope_parameters", None), dict):
            _hold(f"{where}rope_parameters.", rope, numbers, name)
    windows, patch = getattr(vision, "window_size", None), getattr(vision, "patch_size", 1)
    merged = patch * (getattr(vision, "spatial_merge_size", None) or 1)
    if windows is not None and windows < merged:
        raise _misfit(name, "vision_config.window_size", windows, f"at least {merged}, a token's side in pixels")


def check_sizes(config: Any, held: int, name: str) -> None:
    """Refuse sizes that make one matrix far larger than all weights together, before there is memory to be had for it.

    Args:
        config: The configuration.
        held: Numbers in all weights of the model; 0 where they are not here.
        name: The model's, for messages.

    Raises:
        UserError: Naming the field.
    """
    text = config.get_text_config()
    where, width = "" if text is config else "text_config.", _value(text, "hidden_size")
    for field in ("vocab_size", "intermediate_size"):
        value = _value(text, field)
        if _whole(width) and _whole(value) and 0 < _BEYOND * held < value * width:
            raise UserError(
                f"{_file(name)}: `{where}{field}` must fit the model's weights, which hold {held:,} numbers; "
                f"got {value:,}, with `hidden_size` {width:,}. Fetch the file again."
            )


def check_pictures(processor: Any, folder: Path, **expected: Any) -> None:
    """Refuse an image processor that does not show pictures as published ones do, or not as the model takes them.

    Args:
        processor: The whole processor.
        folder: Where its files are.
        **expected: Fields of the image processor → what the model's config.json says they are.

    Raises:
        UserError: Naming the file and the field.
    """
    images = processor.image_processor
    always = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    learnt = {*always, "do_pad"}
    for field, value in {**always, **expected}.items():
        if (came := _plain(getattr(images, field, None))) != value:
            says = "to show pictures as the model learnt them" if field in learnt else "as the model's config.json says"
            raise UserError(f"{_images_file(folder)} must have `{field}` {value}, {says}, got {came!r:.80}.")
    for field, must, holds in _PIXELS:
        if not holds(came := getattr(images, field, None)):
            raise UserError(f"{_images_file(folder)} must have `{field}` {must}, got {came!r:.80}.")


def check_fields(processor: Any, folder: Path, **expected: Any) -> None:
    """Refuse a processor that would write other tokens for a picture than the model has features for.

    Args:
        processor: The whole processor.
        folder: Where its files are.
        **expected: Fields of the processor → what the model's config.json says they are.

    Raises:
        UserError: Naming the file and the field.
    """
    for field, value in expected.items():
        if (came := getattr(processor, field, None)) != value:
            raise UserError(
                f"`{folder / PROCESSOR}` must have `{field}` {value!r}, as the model's config.json says, got "
                f"{'none' if came is None else repr(came)}."
            )


def check_image_token(processor: Any, config: Any, token: str | None, folder: Path) -> None:
    """Refuse a configuration that puts pictures at another token than the one that stands for them in the text.

    Raises:
        UserError: Naming both.
    """
    told = getattr(config, "image_token_id", None)
    if token is None or told is None:
        return
    came = processor.tokenizer.convert_tokens_to_ids(token)
    if came != told:
        field = type(config).attribute_map.get("image_token_id", "image_token_id")
        raise _misfit(str(folder), field, told, f"{came}, the tokenizer's id of `{token}`")


def check_tiles(pinpoints: Any, tile: int, folder: Path) -> None:
    """Refuse canvases that are no pairs of whole tiles.

    Raises:
        UserError: Naming the field.
    """
    fine = isinstance(pinpoints, list | tuple) and len(pinpoints) > 0
    for canvas in pinpoints if fine else ():
        pair = isinstance(canvas, list | tuple) and len(canvas) == 2 and all(map(_whole, canvas))
        fine &= pair and all(side >= tile and side % tile == 0 for side in canvas)
        fine = fine and canvas[0] * canvas[1] <= _MOST_TILES * tile**2
    if not fine:
        must = f"pairs of multiples of {tile}, the image tower's side, of at most {_MOST_TILES} tiles"
        raise _misfit(str(folder), "image_grid_pinpoints", pinpoints, must)


def check_tile_limits(images: Any, folder: Path) -> None:
    """Refuse limits of a picture's tiles that leave it none, or that make every picture a huge one.

    Raises:
        UserError: Naming the file.
    """
    least, most = images.min_patches, images.max_patches
    if not (_whole(least) and _whole(most) and 1 <= least <= most <= _MOST_TILES):
        raise UserError(
            f"{_images_file(folder)} must have 1 <= `min_patches` <= `max_patches` <= {_MOST_TILES}, in tiles, got "
            f"{least!r:.40} and {most!r:.40}."
        )


def check_longest(images: Any, folder: Path) -> None:
    """Refuse an image processor that does not fit the longer side of a picture to a number of pixels.

    Raises:
        UserError: Naming the file.
    """
    came = getattr(images.size, "longest_edge", None)
    if not (_whole(came) and came >= 1):
        raise UserError(f"{_images_file(folder)} must have `size` with a `longest_edge` in pixels, got {came!r:.40}.")


def check_patches(images: Any, folder: Path) -> None:
    """Refuse limits of a picture's pixels that leave it none, or that make every picture a huge one.

    Raises:
        UserError: Naming the file.
    """
    least, most = (getattr(images.size, name, None) for name in ("shortest_edge", "longest_edge"))
    token = (images.patch_size * images.merge_size) ** 2
    if not (_whole(least) and _whole(most) and 1 <= least <= most and least <= _MOST_TOKENS * token):
        raise UserError(
            f"{_images_file(folder)} must have `size` with 1 <= `shortest_edge` <= `longest_edge` in pixels, and "
            f"`shortest_edge` at most {_MOST_TOKENS * token:,}, got {least!r:.40} and {most!r:.40}."
        )


def _three(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_real(one) for one in value)


_PIXELS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("rescale_factor", "1/255", lambda value: _real(value) and math.isclose(value, 1 / 255, rel_tol=1e-4)),
    ("image_mean", "of three numbers", _three),
    ("image_std", "of three numbers above 0", lambda value: _three(value) and min(value) > 0),
    ("resample", "1 (Lanczos), 2 (bilinear) or 3 (bicubic)", lambda value: value in (1, 2, 3)),
)
"""What attacks go through, exactly, and what every published image processor has."""


def _hold(
    where: str, fields: Mapping[str, Any], numbers: _Numbers, name: str, laws: Mapping[str, _Law] = _LAWS
) -> None:
    for field, law in laws.items():
        value = fields.get(field)
        if value is not None and (must := law(value, numbers)):
            raise _misfit(name, f"{where}{field}", value, must)


def _value(part: Any, field: str) -> Any:
    """What a configuration says; None where it says nothing, or something else for some of the blocks."""
    try:
        return getattr(part, field, None)
    except RuntimeError:  # transformers' own, for a field that each block has for itself
        return None


def _angles(text: Any) -> int | None:
    size, heads, head = (_value(text, f) for f in ("hidden_size", "num_attention_heads", "head_dim"))
    if head is None and _whole(size) and _whole(heads) and heads > 0:
        head = size // heads
    share = (getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor", 1)
    return int(head * share) // 2 if _whole(head) and _real(share) else None


def _within(value: Any, least: int | None, end: int | None, of: str) -> str | None:
    if not _whole(value):
        return "a whole number"
    if end is None or least is None or least <= value < end:
        return None
    return f"from {least} to {end - 1}, one of {of}"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if hasattr(value, "shortest_edge"):
        return {key: one for key, one in dict(value).items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _file(name: str) -> str:
    return f"`{CONFIG}` of `{name}`"


def _images_file(folder: Path) -> str:
    """The file that an image processor is read from."""
    old = (folder / OLD_PROCESSOR).is_file()
    return f"`{folder / (OLD_PROCESSOR if old else PROCESSOR)}`"


def _misfit(name: str, field: str, value: Any, must: str) -> UserError:
    return UserError(f"{_file(name)}: `{field}` must be {must}, got {value!r:.80}.")
