"""mm_cb: train multimodal circuit breakers, attack them with images, measure what they keep, report it on one page.

Importing this package is cheap on purpose: nothing here imports torch or transformers.
"""

import mm_cb.miniature  # noqa: F401  (the one place that knows the guest, whose import registers it)

__version__ = "0.1.0"
