"""Tests; whatever they import may import torchvision, which mm_cb mends where it does not fit this torch."""

import mm_cb  # noqa: F401
