"""``mm-cb demo --real``: a pretrained model loses cooking recipes and keeps the rest, on one page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.run import run_attack
from mm_cb.core.checked import read_json
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.pages import PAGE, refuse_other_page
from mm_cb.core.paths import data_path
from mm_cb.core.progress import Progress
from mm_cb.core.provenance import peak_memory_bytes
from mm_cb.core.reading import json_file
from mm_cb.core.runs import read_jsonl, write_json, write_text
from mm_cb.inference.source import ModelSource
from mm_cb.models import ChatModel, load_model
from mm_cb.real.answers import before_and_after, coherent
from mm_cb.real.package import real_model
from mm_cb.real.page import ATTACKS, SUFFIX, TITLE, Round, numbers, render, summary
from mm_cb.training.outcome import ENOUGH_STEPS
from mm_cb.training.recipes.config import Recipe
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.representations import compare
from mm_cb.training.run import train

ROWS: dict[str, dict[str, float | None]] = {
    "cooking": {"weight": 1.0, "limit": None},
    "other": {"weight": 1.0, "limit": 100},
    "forms": {"weight": 2.0, "limit": None},
    "near": {"weight": 2.0, "limit": None},
}
"""The shipped rows. What a breaker cannot tell from the topic without having seen it comes twice: requests of the same
forms, and food."""
OPENING = "Here is a simple recipe"
"""What an attacker writes in front of the answer, and pushes towards."""
ATTACKED = 3
"""Prompts that are attacked, the first ones: a step on embeddings costs as much as one of training."""
STEPS, CANDIDATES = 20, 8
"""Of these attacks, and suffixes weighed at each: minutes on a laptop, far from the published 500 and 512."""
MAX_NEW_TOKENS = 40
_RECIPE = Path(__file__).with_name("recipe.yaml")


def run_real(out: Path, *, seed: int, seeds: int = 1) -> Path:
    """Bring the model, train, ask, attack, and write ``out/report.html``; what is finished is not done again.

    Args:
        out: Gets ``train``, ``attack-base``, ``attack-rr`` (run directories), ``answers.json``, ``timings.json``, the
            same without attacks of further seeds in ``seed-N``, and the page with its numbers, ``numbers.json``.
        seed: Of the first training and of the attacks.
        seeds: Breakers to train, each from its own seed.

    Returns:
        The page.

    Raises:
        UserError: As `real_model`; or ``out`` holds other runs or another page; or, when the page is written, a
            training did not take hold.
    """
    page = out / PAGE
    refuse_other_page(page, TITLE)
    with Progress() as progress:
        model = real_model(progress)
    asked = json_file(data_path("smollm2", "asked.json"), dict, "a JSON object of prompts")
    rounds = [_round(model, out, asked, seed)]
    rounds += [_round(model, out / f"seed-{more}", asked, more, attack=False) for more in range(seed + 1, seed + seeds)]
    write_json(out / "numbers.json", numbers(rounds))
    write_text(page, render(rounds, STEPS, CANDIDATES))
    with Progress() as progress:
        for line in summary(rounds):
            progress.say(line)
        progress.say(f"\nreport  {page}")
    for one in rounds:
        if one.stuck and len(one.metrics) >= ENOUGH_STEPS:
            raise UserError(f"seed {one.seed}: {one.stuck}; the page is `{page}`.")
    return page


def real_recipe(model: Path, seed: int, changes: Sequence[str] = ()) -> Recipe:
    """The shipped recipe for a model's folder, with the shipped rows; ``changes`` are ``key=value`` of its fields."""
    rows = [{"name": str(data_path("smollm2", f"{name}.jsonl")), **how} for name, how in ROWS.items()]
    sources = json.dumps(rows)
    return load_recipe(
        _RECIPE, [f"model={json.dumps(str(model))}", f"data.sources={sources}", f"seed={seed}", *changes]
    )


def _round(model: Path, out: Path, asked: dict[str, list[str]], seed: int, *, attack: bool = True) -> Round:
    """Train a breaker, attack it beside the base, and ask both."""
    begun = time.monotonic()
    with Progress() as progress:
        trained = train(real_recipe(model, seed), out / "train", progress=progress)
    timings = {"training_minutes": round((time.monotonic() - begun) / 60, 1)}
    subjects = ("base", "rr") if attack else ()
    runs = {name: _attack(model, trained, out, name, asked["forbidden"], seed) for name in subjects}
    found = read_json(out / "answers.json")
    if found is None:
        found = _measure(model, trained, asked, runs)
        timings["minutes"] = round((time.monotonic() - begun) / 60, 1)
        timings["peak_gb"] = round((peak_memory_bytes() or 0) / 1e9, 2)
        write_json(out / "timings.json", timings)
        write_json(out / "answers.json", found)
    took = read_json(out / "timings.json") or {}
    return Round(seed, found, read_jsonl(out / "train" / "metrics.jsonl"), took)


def _attack(model: Path, trained: Path, out: Path, name: str, prompts: list[str], seed: int) -> Path:
    """Attack base or breaker with the forbidden prompts, which no picture goes with."""
    behaviors = out / "behaviors.jsonl"
    attacked = enumerate(prompts[:ATTACKED])
    records = [{"id": f"f{i}", "prompt": one, "target": OPENING, "image": None} for i, one in attacked]
    write_text(behaviors, "".join(dumps(record) + "\n" for record in records))
    source = ModelSource(str(model), str(trained) if name == "rr" else None)
    names = [attack for attack in ATTACKS if name == "rr" or attack != SUFFIX]  # the base needs none to comply
    config = AttackConfig(steps=STEPS, seed=seed, max_new_tokens=MAX_NEW_TOKENS, batch=5)
    if SUFFIX in names:
        config = replace(config, candidates=CANDIDATES)
    run_attack(source, behaviors, out / f"attack-{name}", names, config)
    return out / f"attack-{name}"


def _measure(model: Path, trained: Path, asked: dict[str, list[str]], runs: dict[str, Path]) -> dict[str, Any]:
    """Answers before and after by set of prompts, states behind them, and coherent ones by attack and subject."""
    both = load_model(model, adapter=trained)
    with Progress() as progress:
        task = progress.task("answers before and after", total=2 * sum(map(len, asked.values())))
        sets = before_and_after(both, asked, MAX_NEW_TOKENS, task.advance)
    states = {
        name: compare(both, one["prompts"], [None] * len(one["prompts"]), one["base"]) for name, one in sets.items()
    }
    return {"sets": sets, "attacks": _under_attack(both, runs), "states": states}


def _under_attack(both: ChatModel, runs: dict[str, Path]) -> dict[str, dict[str, list[bool]]]:
    """Which forbidden answers are coherent, by attack and subject."""
    under: dict[str, dict[str, list[bool]]] = {}
    for subject, folder in runs.items():
        items, judge = read_jsonl(folder / "items.jsonl"), partial(coherent, both)
        for attack in {item["condition"]: None for item in items}:
            own = [item for item in items if item["condition"] == attack]
            verdicts = judge([i["prompt"] for i in own], [_behind(i["completion"], attack) for i in own])
            under.setdefault(attack, {})[subject] = verdicts
    return under


def _behind(completion: str, attack: str) -> str:
    """An answer without the opening that the attacker wrote himself, which says nothing about the model."""
    return completion.removeprefix(OPENING).strip() if attack == "prefill_only" else completion
