"""Does an attack get out what the model knows, or dictate the answer? The control is a wrong answer to force.

``python scripts/swap_responses.py BASE_RUN OUT`` reads a finished `mm-cb attack` run on the base and writes a copy in
which every harmful completion keeps its opening and goes on with that of another behaviour, the one it shares the
fewest words with. Then ``mm-cb attack --attack pgd_clean_teacher hijacks=OUT ...`` forces these. Answers with the right
content are then the model's own; answers with the content that was forced were dictated by the attacker, who knew it.
``scripts/crossed_verdicts.py`` counts both.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mm_cb.errors import UserError  # noqa: E402
from mm_cb.evaluation.candidates import starts_with  # noqa: E402
from mm_cb.runs import read_jsonl, read_run, write_jsonl  # noqa: E402

_WORD = r"\w+|[^\w\s]"


def main() -> None:
    """Read, swap, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        if read_run(options.run).get("command") != "attack":
            raise UserError(f"`{options.run}` must be a run of `mm-cb attack`.")
        items = [item for item in read_jsonl(options.run / "items.jsonl") if item["outcome"] == "harmful"]
        items = [item for item in items if starts_with(item["completion"], item["target"])]
        texts = swapped([(item["target"], item["completion"]) for item in items])
    except UserError as error:
        raise SystemExit(f"swap_responses: {error}") from error
    options.out.mkdir(parents=True)
    shutil.copyfile(options.run / "run.json", options.out / "run.json")
    found = [item | {"completion": text} for item, text in zip(items, texts, strict=True)]
    write_jsonl(options.out / "items.jsonl", found)
    print(f"{len(found)} responses with another behaviour's content in {options.out}")


def swapped(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """For each (target, completion that begins with it): the target and how the least similar other one goes on."""
    if len(pairs) < 2:
        raise UserError(f"needs two harmful completions that begin with their target, got {len(pairs)}.")
    rests = [_behind(target, completion) for target, completion in pairs]
    words = [set(re.findall(_WORD, rest.lower())) for rest in rests]
    found = []
    for i, (target, _) in enumerate(pairs):
        others = [(i + shift) % len(pairs) for shift in range(1, len(pairs))]
        found.append(f"{target} {rests[min(others, key=lambda j: len(words[i] & words[j]))]}")  # noqa: B023 - used here
    return found


def _behind(target: str, completion: str) -> str:
    """What a completion says behind the target's words."""
    places = [match.end() for match in re.finditer(_WORD, completion)]
    return completion[places[len(re.findall(_WORD, target)) - 1] :].strip()


if __name__ == "__main__":
    main()
