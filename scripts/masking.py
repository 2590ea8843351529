"""Does a breaker hide from the adversary it was trained against? Cosines under that adversary and under a patient one.

    python scripts/masking.py ADAPTER [ADAPTER ...] [--rows 16]

Training against a few large gradient steps can end in a breaker that answers to those steps alone (catastrophic
overfitting, arXiv:2001.03994): the training loss is low, and a patient adversary undoes the rerouting with a fraction
of the change. The mean of ReLU(cos) to the base's states of the clean pictures says it: under the training adversary it
must not fall below that of plain pictures, and twenty small steps within a seventh of the radius must not bring it near
1. Length is another place to hide: ``length`` is how many times as long as the base's the rerouted states are (median).
The slope of a cosine falls with it, so an adversary, or an attack, that follows cosines goes blind; one that follows
distances does not (`pgd_clean_teacher`). Adapters are those of `mm-cb train` with a recipe that has an adversary; the
rows are drawn from the recipe's own data, with another seed.
"""

import argparse
import json
from pathlib import Path

import torch

from mm_cb.errors import UserError
from mm_cb.models import TokenRole, load_model
from mm_cb.training.adversary import Adversary, perturb_pictures
from mm_cb.training.batches import PairCollator, PairedExamples
from mm_cb.training.fields import Recipe
from mm_cb.training.hidden_states import Rows, adapted_states, lay_out, reference_states, use_row_attention
from mm_cb.training.run import load_examples

PATIENT = {"steps": 20, "step": 0.15}


def main() -> None:
    """Parse, measure, print a line of JSON for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    for adapter in options.adapters:
        try:
            print(json.dumps({"adapter": str(adapter), **measure(adapter, options.rows)}), flush=True)
        except (UserError, OSError, ValueError) as error:
            parser.error(f"{adapter}: {error}")


def measure(adapter: Path, rows: int) -> dict[str, float]:
    """Mean of ReLU(cos) over the target layers and the counted tokens of circuit-breaker rows with a picture."""
    recipe = Recipe.model_validate(json.loads((adapter / "run.json").read_text())["recipe"])
    recipe = recipe.model_copy(update={"seed": recipe.seed + 1000})
    trained = recipe.circuit_breaker.adversary
    if not trained.steps:
        raise ValueError("the recipe must have an adversary (`circuit_breaker.adversary.steps`), it has none")
    model = load_model(recipe.model, adapter=adapter, device=recipe.device, dtype=recipe.dtype)
    model.model.requires_grad_(False)
    use_row_attention(model)
    pairs = PairedExamples(load_examples(recipe), steps=1, batch_size=rows, batches="multimodal", seed=recipe.seed)
    batch = PairCollator(model, recipe.circuit_breaker.masks.model_dump())([pairs[i] for i in range(rows)])
    inputs, targets = batch["circuit_breaker"], recipe.circuit_breaker.target_layers
    laid = lay_out(model, inputs, batch["circuit_breaker_mask"])
    place = inputs.roles[inputs.attention_mask.bool()] == TokenRole.IMAGE

    counted = laid.mask.bool()
    reference = reference_states(model, laid, 0, targets)[:, counted]

    def states(rows: Rows) -> torch.Tensor:
        return adapted_states(model, rows, 0, targets)[:, counted]

    def cosines(rows: Rows) -> torch.Tensor:
        return torch.cosine_similarity(states(rows), reference, dim=-1)

    def under(adversary: Adversary) -> float:
        seeds = range(len(laid.lengths))
        embeds = perturb_pictures(
            laid.embeds, place, laid.lengths, seeds, lambda e: cosines(laid._replace(embeds=e)).sum(), adversary
        )
        return mean(laid._replace(embeds=embeds))

    @torch.no_grad()
    def mean(rows: Rows) -> float:
        return round(float(cosines(rows).relu().mean()), 3)

    with torch.no_grad():
        lengths = states(laid).norm(dim=-1) / reference.norm(dim=-1)
    return {
        "length": round(float(lengths.median()), 2),
        "plain": mean(laid),
        "training_adversary": under(Adversary(trained.steps, trained.radius)),
        "patient": under(Adversary(radius=trained.radius, **PATIENT)),
        "patient_seventh": under(Adversary(radius=trained.radius / 7, **PATIENT)),
    }


if __name__ == "__main__":
    main()
