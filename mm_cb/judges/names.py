"""The judges by name, and where their checkpoints are published; imports nothing, for ``--help``."""

CHECKPOINTS = {
    "harmbench": "cais/HarmBench-Llama-2-13b-cls",
    "harmbench-multimodal": "cais/HarmBench-Llama-2-13b-cls-multimodal-behaviors",
    "harmbench-mistral": "cais/HarmBench-Mistral-7b-val-cls",
    "llama-guard-3-vision": "meta-llama/Llama-Guard-3-11B-Vision",
    "llama-guard-4": "meta-llama/Llama-Guard-4-12B",
    "strongreject": "qylu4156/strongreject-15k-v1",
}
STRONGREJECT_BASE = "google/gemma-2b"
JUDGES = (*CHECKPOINTS, "endpoint", "refusal-strings", "miniature")
JUDGED = ("compliance",)
"""What the checkpoints can judge: answers to forbidden requests."""
