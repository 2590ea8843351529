"""What this transformers calls the keys and values that it is given."""

import inspect

from transformers import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""Name of the argument, of models and of their blocks: renamed in transformers 5.24."""
