"""Shapes of the shipped recipes' models as published, for planning on a machine that has not fetched them yet."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

_SHAPES = Path(__file__).with_name("known.yaml")


@cache
def _shapes() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(_SHAPES.read_text(encoding="utf-8"))


def known_config(name: str) -> Any | None:
    """The configuration of a model that a shipped recipe names, or None; only its shape is meant."""
    fields = deepcopy(_shapes().get(name))  # transformers changes what it is given
    return None if fields is None else AutoConfig.for_model(fields.pop("model_type"), **fields)
