"""Patterns of strangers: matched once apart, within a limit of time, before this process matches them."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache

from peft import LoraConfig

SECONDS = 5
"""What all patterns of an adapter may take of a processor on all names of a model's modules."""
_CHILD = """
import json, re, resource, sys
seconds = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
told = json.load(sys.stdin)
for name in told["names"]:
    for match, pattern in told["patterns"]:
        try:
            getattr(re, match)(pattern, name)
        except Exception:
            pass  # told by who reads it next
"""


def pattern_fault(config: LoraConfig, names: Iterable[str]) -> str | None:
    """Why an adapter's patterns cannot be matched with the names of a model's modules; None where they can.

    A pattern may take longer than the universe is old, and nothing ends a match of Python's within its process.

    Args:
        config: PEFT matches its ``target_modules`` and ``exclude_modules`` where they are texts, its
            ``layers_pattern``, and the keys of ``rank_pattern`` and ``alpha_pattern``.
        names: Of the modules.
    """
    patterns = list(dict.fromkeys(_patterns(config)))
    if patterns and not _ends(json.dumps({"patterns": patterns, "names": list(names)})):
        return (
            f"matching its patterns (`target_modules` and the like) with the names of the model's modules takes more "
            f"than {SECONDS} seconds: write the names of the modules as a list"
        )
    return None


def _patterns(config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Each as PEFT or `mm_cb.models.adapters` puts it, with the function of `re` that it is given to."""
    for whole in (config.target_modules, config.exclude_modules):
        if isinstance(whole, str):
            yield "fullmatch", whole
    layers = config.layers_pattern or []
    for part in layers if isinstance(layers, list) else [layers]:
        yield "match", rf"(?:^|.*?\.){part}\.(?P<idx>\d+)\."
    for key in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        yield "match", rf"(.*\.)?({key})$"
        yield "fullmatch", rf"(.*\.)?{key.removeprefix('^')}"


@cache
def _ends(told: str) -> bool:
    """Whether Python is done with the patterns in time."""
    child = [sys.executable, "-I", "-S", "-c", _CHILD, str(SECONDS)]
    done = subprocess.run(child, input=told, capture_output=True, text=True, check=False)
    return done.returncode not in (-signal.SIGXCPU, -signal.SIGKILL)
