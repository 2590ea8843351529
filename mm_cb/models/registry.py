"""The table of model families: which class of ours a model belongs to, by the type that its configuration names."""

from typing import Any, TypeVar

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mm_cb.core.errors import UserError
from mm_cb.models.aya_vision import AyaVisionModel
from mm_cb.models.base import ChatModel
from mm_cb.models.gemma3 import Gemma3Model
from mm_cb.models.gemma4 import Gemma4Model
from mm_cb.models.internvl import InternVLModel
from mm_cb.models.llava import LlavaModel
from mm_cb.models.llava_next import LlavaNextModel
from mm_cb.models.llava_onevision import LlavaOnevisionModel
from mm_cb.models.mistral3 import Mistral3Model
from mm_cb.models.qwen3_5 import Qwen35Model
from mm_cb.models.qwen_vl import QwenVLModel
from mm_cb.models.refusals import why_refused, why_unchecked
from mm_cb.models.smolvlm import SmolVLMModel
from mm_cb.models.text import TextModel

_Family = TypeVar("_Family", bound=type[ChatModel])

_FAMILIES: dict[str, type[ChatModel]] = {}


def register_family(family: _Family) -> _Family:
    """Have models of the types that a class names read by it; usable as a decorator.

    Raises:
        ValueError: If it names none, or no language tower that it was checked with.
    """
    if not family.model_types:
        raise ValueError(f"`{family.__name__}.model_types` must name the model types that the family is for.")
    if not family.text_types:
        raise ValueError(f"`{family.__name__}.text_types` must name the language towers that it was checked with.")
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


for _family in (
    AyaVisionModel,
    Gemma3Model,
    Gemma4Model,
    InternVLModel,
    LlavaModel,
    LlavaNextModel,
    LlavaOnevisionModel,
    Mistral3Model,
    Qwen35Model,
    QwenVLModel,
    SmolVLMModel,
):
    register_family(_family)


def family_types() -> list[str]:
    """The model types of all families that see."""
    return sorted(_FAMILIES)


def family_of(config: Any, name: str = "") -> type[ChatModel]:
    """The family of a configuration: a registered one, or that of models of text alone.

    Raises:
        UserError: If the model sees and its family is not here, or was not checked with its language tower, saying
            why; or it is no causal language model.
    """
    kind = config.model_type
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    for one in (f"{kind}+{tower}", kind):
        if (family := _FAMILIES.get(one)) is not None:
            if why := why_unchecked(config, family.text_types, family.text_fields):
                raise UserError(f"`{name}` is a {kind} that is not supported: {why}. See docs/supported_models.md.")
            return family
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or hasattr(config, "vision_config")
    if sees or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"`{name}` must be a causal language model or one of the families {', '.join(family_types())}, got {kind}; "
            "docs/add_a_model.md says how a family is added." + (f" Of {kind}: {why_refused(config)}." if sees else "")
        )
    return TextModel
