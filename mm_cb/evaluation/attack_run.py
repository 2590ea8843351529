"""``mm-cb attack``: one attack on one model over a behaviours file, into one run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_cb.errors import UserError
from mm_cb.evaluation.behaviors import Behavior, read_behaviors
from mm_cb.evaluation.hijack import OPTIMISED, Attack, Judge, attack_behaviors, curves
from mm_cb.evaluation.results import measure, write_results
from mm_cb.evaluation.subjects import Subject
from mm_cb.models import load_model
from mm_cb.models.loading import MINIATURE
from mm_cb.paths import safe_id
from mm_cb.progress import Progress
from mm_cb.runs import RunDirectory, write_bytes, write_json, write_jsonl


def run_attack(
    *,
    model: str,
    adapter: str | None,
    behaviors: Path,
    out: Path,
    attack: str,
    epsilon: int,
    steps: int,
    restarts: int,
    seed: int,
) -> None:
    """Attack a model and write ``items.jsonl``, ``results.json``, ``curves.json`` and the pictures.

    Without a judge for the model (only the miniature has an exact one) outcomes are ``not_judged``.
    """
    if attack == "pgd_adaptive" and adapter is None:
        raise UserError(
            "`--attack pgd_adaptive` matches hidden states of the base model: give the `--adapter` to attack."
        )
    asked = read_behaviors(behaviors)
    recipe = {
        "model": model,
        "adapter": adapter,
        "attack": attack,
        "epsilon": epsilon,
        "steps": steps,
        "restarts": restarts,
        "fiction": model == "miniature",
    }
    inputs = [behaviors, *(b.image for b in asked if b.image is not None), *weights_of(model, adapter)]
    with RunDirectory(out, "attack", recipe, seed, inputs=inputs) as run, Progress() as progress:
        if run.finished:
            progress.say(f"finished before, results in {run.path / 'results.json'}")
            return
        loaded = load_model(model, adapter=adapter)
        _refuse_placeholders(asked, loaded.processor.image_token)
        subject = Subject("rr" if adapter else "base", loaded, adapted=adapter is not None)
        plan = Attack(attack, epsilon, steps, restarts, seed, canvas=canvas_of(loaded.processor))
        items = attack_behaviors(subject, asked, plan, run.path, judge_of(model), progress)
        keep_worst(items, run.path)
        write_jsonl(run.path / "items.jsonl", items)
        write_json(run.path / "curves.json", curve_quartiles(run.path, subject.name, plan))
        write_results(run.path / "results.json", measure(items, pairs=[]))
        run.finish()
        progress.say(f"{len(items)} behaviours attacked, results in {run.path / 'results.json'}")


def _refuse_placeholders(behaviors: Sequence[Behavior], token: str) -> None:
    for behavior in behaviors:
        if token in behavior.prompt or token in behavior.target:
            raise UserError(
                f"behaviour {behavior.id!r} must not hold the model's image placeholder `{token}` in its texts; "
                "the picture is put in front of the prompt by itself."
            )


def weights_of(model: str, adapter: str | None) -> list[Path]:
    """The local weight files behind a model and an adapter: a run belongs to their content, not to their names."""
    folders = [MINIATURE if model == "miniature" else Path(model), *([Path(adapter)] if adapter else [])]
    return [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.safetensors"))]


def judge_of(model: str) -> Judge:
    """The exact judge for the miniature, otherwise one that gives no verdict."""
    if model == "miniature":
        from mm_cb.miniature.scoring import judge_behavior

        return judge_behavior
    return _not_judged


def _not_judged(behavior: Behavior, completion: str) -> str:
    return "not_judged"


def canvas_of(processor: Any) -> tuple[int, int]:
    """Height and width of the grey canvas: two tiles square, 672 x 672 for LLaVA-NeXT.

    The miniature's pictures are one tile high and two wide; so is its canvas.
    """
    tile = processor.image_processor.crop_size["height"]
    return (tile, 2 * tile) if tile < 100 else (2 * tile, 2 * tile)


def keep_worst(items: Sequence[dict[str, Any]], folder: Path) -> None:
    """Put the selected picture of every behaviour at ``images/<safe_id>.png``: the worst over everything tried."""
    best: dict[str, tuple[bool, float, str]] = {}
    for item in items:
        rank = (item["outcome"] != "harmful", item["loss"], item["image"])
        best[item["id"]] = min(best.get(item["id"], rank), rank)
    for behavior_id, (_, _, image) in best.items():
        write_bytes(folder / "images" / f"{safe_id(behavior_id)}.png", (folder / image).read_bytes())


def curve_quartiles(folder: Path, subject: str, attack: Attack) -> list[dict[str, Any]]:
    """Quartiles over behaviours of the loss at every step of the first run; empty for attacks that do not optimise."""
    if attack.name not in OPTIMISED:
        return []
    losses = np.array(curves(folder, attack.name))
    q25, q50, q75 = (np.round(np.quantile(losses, q, axis=0), 4).tolist() for q in (0.25, 0.5, 0.75))
    return [{"subject": subject, "condition": attack.name, "q25": q25, "q50": q50, "q75": q75, "n": len(losses)}]
