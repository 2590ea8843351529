"""Model families: load a model, find its decoder blocks, format its chats, turn pictures into inputs."""

from mm_cb.core.packages import prepare_torchvision

prepare_torchvision()

from mm_cb.models.base import ChatModel  # noqa: E402
from mm_cb.models.chat import TokenRole  # noqa: E402  (transformers may only be imported after the line above)
from mm_cb.models.inputs import ModelInputs  # noqa: E402
from mm_cb.models.loading import load_model, load_tower  # noqa: E402
from mm_cb.models.registry import register_family  # noqa: E402
from mm_cb.models.text import TextModel  # noqa: E402
from mm_cb.models.vision import VisionModel  # noqa: E402

__all__ = [
    "ChatModel",
    "ModelInputs",
    "TextModel",
    "TokenRole",
    "VisionModel",
    "load_model",
    "load_tower",
    "register_family",
]
