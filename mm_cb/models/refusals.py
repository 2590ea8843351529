"""Why a model that sees is not read here: by its type, or by what its configuration says it is made of."""

from collections.abc import Collection, Mapping
from typing import Any

_CROSS = "its pictures enter by cross attention in blocks of their own, not as tokens of the text"
_CODES = "its pictures are tokens of a codebook, through which no gradient reaches their pixels"
_FILMS = "it is made for films, whose frames are chosen before anything here could see them"
_READER = "it reads text off pictures and has no chats to train or attack"

_BY_TYPE = {
    "chameleon": _CODES,
    "deepseek_ocr2": _READER,
    "diffusion_gemma": "it writes by diffusion, many tokens at once, so that no token has a likelihood of its own",
    "emu3": _CODES,
    "evolla": "it sees proteins, not pictures",
    "gemma3n": "its blocks carry several states side by side, which the rerouting losses do not know",
    "gemma4_unified": "it has no image tower, its patches go into the language tower as they are; it is no gemma4",
    "glm_ocr": _READER,
    "got_ocr2": _READER,
    "idefics": _CROSS,
    "instructblipvideo": _FILMS,
    "lighton_ocr": _READER,
    "llava_next_video": _FILMS,
    "mllama": _CROSS,
    "paligemma": "its prompts see themselves both ways and it has no chats",
    "pi0": "it moves robots",
    "shieldgemma2": "it is a classifier of pictures",
    "video_llama_3": _FILMS,
    "video_llava": _FILMS,
}
_CHOOSING = "its blocks choose between experts"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def why_refused(config: Any) -> str:
    """Why no family here has models of a configuration's type; a few words, to stand behind a colon."""
    text = config.get_text_config()
    if config.model_type in _BY_TYPE:
        return _BY_TYPE[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder reads its prompts and another tower answers; rerouting looks at one tower that does both"
    if _chooses(text):
        return f"{_CHOOSING}, and no law here has looked at rerouting through them"
    if hasattr(config, "qformer_config"):
        return "a second transformer (Q-Former) asks its image tower, and it has no chats"
    return "no law here has been run on it"


def why_unchecked(config: Any, types: Collection[str], fields: Mapping[str, Collection[object]]) -> str | None:
    """Why a model of a family that is here is not read: its language tower is none of those that the laws were run on.

    Args:
        config: The model's configuration.
        types: ``text_config.model_type`` of those towers.
        fields: Fields of ``text_config`` that change how rows go through the blocks, with the values that were run.

    Returns:
        A few words, to stand behind a colon; None if it is one of those.
    """
    text = config.get_text_config()
    if text.model_type not in types:
        why = f" ({_CHOOSING})" if _chooses(text) else ""
        run = ", ".join(f"`{one}`" for one in types)
        return f"its language tower is a `{text.model_type}`{why}, and the laws were checked with {run}"
    for field, fine in fields.items():
        if (came := getattr(text, field, None)) not in fine:
            values = " and ".join(map(repr, fine))
            return f"`text_config.{field}` is {came!r:.40}, and the laws were checked with {values}"
    return None


def _chooses(text: Any) -> bool:
    return any(getattr(text, field, None) for field in _EXPERTS)
