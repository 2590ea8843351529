"""Benchmarks: items, prompt, score, metric. Importing this registers those that are shipped, in the order of tables."""

from mm_cb.benchmarks.function_calling.benchmark import FunctionCalling
from mm_cb.benchmarks.harmful_calls.benchmark import HarmfulCalls
from mm_cb.benchmarks.llava_wild.benchmark import LlavaWild
from mm_cb.benchmarks.mmmu.benchmark import Mmmu
from mm_cb.benchmarks.over_refusal.benchmark import OverRefusal
from mm_cb.benchmarks.pope import Pope
from mm_cb.benchmarks.registry import register_benchmark

for _shipped in (Mmmu(), LlavaWild(), Pope(), FunctionCalling(), HarmfulCalls(), OverRefusal()):
    register_benchmark(_shipped)
