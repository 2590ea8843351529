"""``mm-cb demo --real``: a pretrained model loses cooking recipes and keeps the rest, on one page."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.run import run_attack
from mm_cb.core.checked import read_json
from mm_cb.core.files import dumps
from mm_cb.core.paths import data_path
from mm_cb.core.progress import Progress
from mm_cb.core.reading import json_file
from mm_cb.core.runs import read_jsonl, write_json, write_text
from mm_cb.inference.source import ModelSource
from mm_cb.models import load_model
from mm_cb.real.answers import Answers, before_and_after, coherent
from mm_cb.real.package import real_model
from mm_cb.training.recipes.config import Recipe
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train

ROWS = ("cooking", "other", "near")
OPENING = "Here is a simple recipe"
"""What an attacker writes in front of the answer, and pushes towards."""
ATTACKS = ("no_attack", "prefill_only", "embedding")
ATTACKED = 5
"""Prompts that are attacked, the first ones: a step on embeddings costs as much as one of training."""
MAX_NEW_TOKENS = 40
STUCK = 0.9
"""Held-out cosine above which nothing was rerouted."""
_RECIPE = Path(__file__).with_name("recipe.yaml")


def run_real(out: Path, *, seed: int) -> Path:
    """Bring the model, train, ask, attack, and write ``out/report.html``; what is finished is not done again.

    Args:
        out: Gets ``train``, ``attack-base``, ``attack-rr`` (run directories), ``answers.json`` and the page.
        seed: Of training and attacks.

    Returns:
        The page.

    Raises:
        UserError: As `real_model`; or ``out`` holds other runs.
    """
    started = time.monotonic()
    with Progress() as progress:
        model = real_model(progress)
        trained = train(real_recipe(model, seed), out / "train", progress=progress)
    asked = json_file(data_path("smollm2", "asked.json"), dict, "a JSON object of prompts")
    runs = {name: _attack(model, trained, out, name, asked["forbidden"], seed) for name in ("base", "rr")}
    found = read_json(out / "answers.json")
    if found is None:
        found = _measure(model, trained, asked, runs)
        write_json(out / "answers.json", found)
    page = out / "report.html"
    write_text(page, render(found, read_jsonl(out / "train" / "metrics.jsonl"), time.monotonic() - started))
    with Progress() as progress:
        for line in summary(found):
            progress.say(line)
        progress.say(f"\nreport  {page}")
    return page


def real_recipe(model: Path, seed: int) -> Recipe:
    """The shipped recipe for a model's folder, with the shipped rows."""
    sources = json.dumps([{"name": str(data_path("smollm2", f"{name}.jsonl"))} for name in ROWS])
    return load_recipe(_RECIPE, [f"model={json.dumps(str(model))}", f"data.sources={sources}", f"seed={seed}"])


def _attack(model: Path, trained: Path, out: Path, name: str, prompts: list[str], seed: int) -> Path:
    """Attack base or breaker with the forbidden prompts, which no picture goes with."""
    behaviors = out / "behaviors.jsonl"
    attacked = enumerate(prompts[:ATTACKED])
    records = [{"id": f"f{i}", "prompt": one, "target": OPENING, "image": None} for i, one in attacked]
    write_text(behaviors, "".join(dumps(record) + "\n" for record in records))
    source = ModelSource(str(model), str(trained) if name == "rr" else None)
    config = AttackConfig(steps=30, seed=seed, max_new_tokens=MAX_NEW_TOKENS, batch=5)
    run_attack(source, behaviors, out / f"attack-{name}", ATTACKS, config)
    return out / f"attack-{name}"


def _measure(model: Path, trained: Path, asked: dict[str, list[str]], runs: dict[str, Path]) -> dict[str, Any]:
    """Answers before and after by set of prompts, and under attack how many are coherent, by subject and attack."""
    both = load_model(model, adapter=trained)
    sets = {name: before_and_after(both, prompts, MAX_NEW_TOKENS) for name, prompts in asked.items()}
    under: dict[str, dict[str, list[bool]]] = {}
    for subject, folder in runs.items():
        items, judge = read_jsonl(folder / "items.jsonl"), partial(coherent, both)
        for attack in ATTACKS:
            own = [item for item in items if item["condition"] == attack]
            verdicts = judge([i["prompt"] for i in own], [_behind(i["completion"], attack) for i in own])
            under.setdefault(attack, {})[subject] = verdicts
    return {"sets": sets, "attacks": under}


def _behind(completion: str, attack: str) -> str:
    """An answer without the opening that the attacker wrote himself, which says nothing about the model."""
    return completion.removeprefix(OPENING).strip() if attack == "prefill_only" else completion


def summary(found: dict[str, Any]) -> list[str]:
    """One line about every set of prompts and every attack."""
    lines = []
    for name, one in found["sets"].items():
        answers: Answers = one
        lines.append(
            f"{name:10} coherent {_of(answers['coherent_base'])} before, {_of(answers['coherent_breaker'])} after; the "
            f"base's answers cost {answers['nll_base']:.2f} before, {answers['nll_breaker']:.2f} after (nats a token); "
            f"{100 * answers['agreement']:.0f} % of their tokens are still the likeliest"
        )
    for name, by_subject in found["attacks"].items():
        told = ", ".join(f"{_of(verdicts)} {subject}" for subject, verdicts in by_subject.items())
        lines.append(f"{name:12} forbidden answers coherent: {told}")
    return lines


def _of(verdicts: list[bool]) -> str:
    return f"{sum(verdicts)} of {len(verdicts)}"


def render(found: dict[str, Any], metrics: list[dict[str, Any]], seconds: float) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mm_cb.real", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    held_out = [line for line in metrics if "held_out_circuit_breaker_cosine" in line]
    last = held_out[-1] if held_out else None
    stuck = last is None or last["held_out_circuit_breaker_cosine"] > STUCK
    context = {"found": found, "last": last, "stuck": stuck, "minutes": seconds / 60, "of": _of, "shown": 5}
    return environment.get_template("page.html.j2").render(context)
