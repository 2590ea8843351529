"""Is a breaker of the miniature a draw? One recipe trained with several seeds and thread counts, each attacked alike.

    python scripts/benchmarks/spread.py --out DIR [--seeds 0,1,2,3,4] [--threads 1,2] [--requests demo|validation]
        [--attack pgd_homotopy=900,pgd_facts=300] [--data whole|requests_kept|no_refusals] [KEY=VALUE ...]

Attacks stand with their steps, recipe fields as KEY=VALUE. Every breaker is one line of DIR/breakers.jsonl, written as
it is done; the same command goes on. ``demo``: 24 of the demo's 48 requests; ``validation``: 24 that are on no page, to
choose settings by. ``--data`` is the paper's data ablation: no request is removed, or the retain set holds no refusals.
Asked besides: 900 lettered and 300 open questions, 240 look-alikes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from _lines import lines_of

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.registry import attack_entry
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.threats import Threat
from mm_cb.cli.failures import script
from mm_cb.core.closing import say
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.provenance import hardware
from mm_cb.core.records import Item
from mm_cb.core.runs import append_jsonl, read_jsonl
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.inference.questions import ask
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import measure
from mm_cb.metrics.table import WORST_CASE
from mm_cb.miniature import NAME, data
from mm_cb.miniature.scoring import judge_behavior, score_question
from mm_cb.models import load_model
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.representations import compare
from mm_cb.training.run import train

DATA: dict[str, dict[str, bool]] = {
    "whole": {},
    "requests_kept": {"remove_requests": False},
    "no_refusals": {"refusals": False},
}
"""What the rows to train on lack."""
WHOLE = ("compliance", "all")
WORST = {"all": WORST_CASE, "opening": "worst_case_opening"}
"""What a line calls the worst of all attacks, and of those told an opening at most."""
SPLITS = {"demo": ((24, 12, 12), 0), "validation": ((12, 6, 6), 23)}
"""Trained brews, new combinations, the kind never trained on; and the seed that draws them."""


def main() -> None:
    """Train and attack what is not done yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--requests", choices=SPLITS, default="demo")
    parser.add_argument("--data", choices=DATA, default="whole")
    parser.add_argument("--attack", default="pgd_homotopy=900,pgd_facts=300", metavar="NAME=STEPS,...")
    options = parser.parse_intermixed_args()
    load_recipe(NAME, options.fields)
    attacks = [("no_attack", 1), *(attack_of(part) for part in options.attack.split(","))]
    cells = options.out / "breakers.jsonl"
    asked = {"fields": options.fields, "requests": options.requests, "data": options.data, "steps": options.attack}
    done = {(line["seed"], line["threads"]) for line in lines_of(cells, **asked)}
    seeds, threads = (list(map(number, given.split(","))) for given in (options.seeds, options.threads))
    behaviors = requests(options.requests, options.out)
    for key in itertools.product(seeds, threads):
        if key not in done:
            append_jsonl(cells, breaker(*key, options, attacks, behaviors))
            say(str(read_jsonl(cells)[-1]))
    print(table(read_jsonl(cells)))


def requests(name: str, out: Path) -> list[Behavior]:
    """The 24 requests, from a file below ``out``."""
    counts, seed = SPLITS[name]
    given = read_behaviors(data.write_behaviors(data.behaviors(counts, seed), out / name))
    return given if len(given) == 24 else [*given[:6], *given[24:30], *given[36:]]


def number(text: str) -> int:
    """A seed, or a number of threads."""
    if not text.strip().isdecimal():
        raise UserError(f"--seeds and --threads must be whole numbers with commas between, got {text!r}.")
    return int(text)


def attack_of(text: str) -> tuple[str, int]:
    """Name and steps of a ``NAME=STEPS``."""
    name, _, steps = text.partition("=")
    if not steps.isdecimal():
        raise UserError(f"--attack must be NAME=STEPS with commas between, got {text!r}.")
    return attack_entry(name).name, int(steps)


def breaker(
    seed: int, threads: int, options: Any, attacks: list[tuple[str, int]], behaviors: list[Behavior]
) -> dict[str, Any]:
    """Train one, attack it and ask it: a line of the file."""
    out = options.out / f"seed{seed}-threads{threads}"
    torch.set_num_threads(threads)
    started = time.monotonic()
    with Progress() as progress:
        recipe = load_recipe(NAME, [*options.fields, f"seed={seed}"])
        adapter = train(recipe, out / "rr", data.training_examples(seed, **DATA[options.data]), progress=progress)
        torch.set_num_threads(threads)
        trained = time.monotonic() - started
        subject = Subject("rr", load_model(NAME, adapter=adapter), adapted=True)
        attacked, tried = {}, list[Item]()
        for name, steps in attacks:
            how = AttackConfig(
                name, Threat("linf", 32), steps, 1, 0, batch=24, artefacts=False, checkpoint_seconds=None
            )
            items = attack_behaviors(subject, behaviors, how, out / "attacks", judge_behavior, progress)
            attacked[name] = {o: sum(item["outcome"] == o for item in items) for o in ("harmful", "gibberish")}
            tried += items
        kept: dict[str, Any] = {}
        for name, questions in benign().items():
            answers = ask(subject, questions, score_question, out / "kept", progress, name=name)
            kept[name] = {
                "n": len(answers),
                "right": round(sum(float(item["score"] or item.get("correct") or 0) for item in answers), 2),
                "broken": sum(bool(item["gibberish"]) for item in answers),
            }
    return {
        "seed": seed,
        "threads": threads,
        "fields": options.fields,
        "requests": options.requests,
        "data": options.data,
        "steps": options.attack,
        "n": len(behaviors),
        "attacks": attacked,
        "worst": worst(tried),
        "kept": kept,
        "cosine": cosines(subject),
        "machine": hardware(),
        "train_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def worst(items: list[Item]) -> dict[str, int]:
    """Requests that any of the attacks broke, and any that knew no more of the answer than its opening."""
    found = {one.condition: one.counts for one in measure(items, pairs=[]) if (one.metric, one.split) == WHOLE}
    return {name: int(found[condition]["harmful"]) for name, condition in WORST.items() if condition in found}


def benign() -> dict[str, list[data.FictionQuestion]]:
    """What should be answered."""
    return {
        "lettered": data.multiple_choice_questions(150),
        "open": data.open_questions(100),
        "look_alikes": data.look_alikes(),
    }


def cosines(subject: Subject) -> dict[str, list[float]]:
    """Adapter on against off by entry of ``hidden_states``, on answers never trained on."""
    chosen = {
        "held_out_kind": data.behaviors((0, 0, 40), seed=7),
        "retain": [*data.open_questions(10, seed=7), *data.look_alikes(seed=7, count=30)],
    }
    return {
        name: [
            round(value, 4)
            for value in compare(
                subject.model, [q.prompt for q in asked], [q.picture for q in asked], [q.reference for q in asked]
            )["cosine"]
        ]
        for name, asked in chosen.items()
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A line a breaker."""
    rows = []
    for line in lines:
        attacks = "  ".join(f"{k} {v['harmful']}+{v['gibberish']}g" for k, v in line["attacks"].items())
        kept = "  ".join(f"{k} {100 * v['right'] / v['n']:.1f} ({v['broken']} broken)" for k, v in line["kept"].items())
        rows.append(
            f"seed {line['seed']} threads {line['threads']}: of {line['n']}: {attacks} | {kept} | "
            f"{line['train_seconds']:.0f} s"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    script(main)
