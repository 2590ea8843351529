"""Model families: load a model, find its decoder blocks, format its chats, turn pictures into inputs."""

from mm_cb.models.base import ChatModel
from mm_cb.models.chat import TokenRole
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.loading import load_model, load_tower
from mm_cb.models.registry import register_family
from mm_cb.models.text import TextModel
from mm_cb.models.vision import VisionModel

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
