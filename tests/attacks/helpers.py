"""Attack runs on the miniature that take a second."""

import json
import shutil

import torch
from peft import LoraConfig, get_peft_model

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.registry import attack_entry, chosen_attacks
from mm_cb.attacks.run import run_attack
from mm_cb.attacks.threats import Threat
from mm_cb.core.paths import data_path
from mm_cb.core.seal import SEAL, sealed
from mm_cb.inference.source import ModelSource
from mm_cb.metrics.results import tied
from mm_cb.models import load_model
from mm_cb.models.fingerprint import remember_base

BEHAVIORS = data_path("miniature", "behaviors.jsonl")


def first_behaviors(folder, count, start=0):
    """A behaviours file of some of the miniature's behaviours, in a folder of its own."""
    shutil.copytree(BEHAVIORS.parent / "pictures", folder / "pictures", dirs_exist_ok=True)
    lines = BEHAVIORS.read_text().splitlines()[start : start + count]
    (folder / "behaviors.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "behaviors.jsonl"


def attack(
    out,
    behaviors,
    attacks="pgd",
    *,
    model="miniature",
    adapter=None,
    base=None,
    probe=None,
    system=None,
    shard=None,
    **settings,
):
    """A run of few steps in a small ball, without the control beside it unless asked for.

    ``settings`` are fields of `AttackConfig`, or the dtype.
    """
    source = ModelSource(model, adapter, "cpu", settings.pop("dtype", "float32"), system=system, base=base, probe=probe)
    names = chosen_attacks(attacks, adapted=source.breaker, probed=probe is not None)
    if any(attack_entry(name).forces_response for name in names):
        settings.setdefault("control", 0)
    config = AttackConfig(**{"threat": Threat(levels=8), "steps": 2, "batch": 1, "max_new_tokens": 8} | settings)
    run_attack(source, behaviors, out, names, config, shard=shard)
    return out


def save_adapter(folder, seed):
    """An adapter of the miniature's with random weights, as `mm-cb train` leaves one."""
    torch.manual_seed(seed)
    model = load_model("miniature").model
    paths = [name for name, _ in model.named_modules() if name.endswith("language_model.layers.1.mlp.up_proj")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=paths, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "miniature"
    adapted.save_pretrained(folder)
    remember_base(folder, "miniature")
    return folder


def edited(path, edit):
    """A JSON file, changed in place by ``edit``; what it returns is written instead, if anything.

    A seal is made again, as by somebody who rewrites a run consistently.
    """
    content = json.loads(path.read_text())
    made = edit(content)
    made = content if made is None else made
    path.write_text(json.dumps(sealed(made) if SEAL in made else made))


def restated(run, edit):
    """Another run.json, which results.json names, as by somebody who writes both."""
    edited(run / "run.json", edit)
    edited(run / "results.json", lambda told: tied(run, told))
