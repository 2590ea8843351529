"""Train one recipe in several ways and seeds, attack every breaker, and print one table: the paper's ablations.

    python scripts/ablation.py RECIPE --behaviors F --out DIR [--losses rr,rand_p | --data] [--seeds 0,1,2]
        [--attack all] [--steps 300] [--benign REQUESTS.jsonl] [--device cuda] [--dtype bfloat16] [KEY=VALUE ...]

Of losses (the paper's Table 8), all get the same steps, rates and rows; the length term and the adversary, which not
every loss takes, are off for all. With `--data` (its data ablation), the recipe runs as it is, with no request removed,
and without refusals in the retain set. KEY=VALUE are recipe fields. Every step is an mm-cb command in a folder of its
own below DIR: stopped at any time, the same command goes on. A model without exact judge leaves answers not judged:
`mm-cb judge` each run, then give the command again for the table.
"""

import argparse
from pathlib import Path

from _commands import cell, held_out, measured, run, table

from mm_cb.cli.failures import script
from mm_cb.core.closing import say
from mm_cb.training.recipes.config import MixtureConfig, Recipe
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.registry import loss_entry, loss_names

MEASURED = ["training.held_out=null"]
ALIKE = [*MEASURED, "circuit_breaker.keep_length=0", "circuit_breaker.adversary.steps=0"]
Ways = list[tuple[str, list[str]]]
"""A name and the recipe fields that make it."""


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("fields", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--behaviors", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--losses", default=",".join(loss_names()))
    parser.add_argument("--data", action="store_true", help="what rows lack, in place of losses")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--attack", default="all")
    parser.add_argument("--steps", default="300")
    parser.add_argument("--benign", help="requests for `mm-cb eval over-refusal`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_intermixed_args()
    machine = ["--device", options.device, "--dtype", options.dtype]
    recipe = load_recipe(options.recipe, options.fields)
    model, ways = recipe.model, by_data(recipe) if options.data else by_loss(options.losses.split(","))
    if len(ways) == 1 and options.data:
        parser.error(
            "`--data` needs a recipe whose `sources:` remove requests or keep refusals, as llama-3-8b-instruct"
        )
    benign = ["benign requests refused, %", "broken"] if options.benign else []
    head = [
        "rows" if options.data else "loss",
        "seed",
        "held-out cosine: rerouted",
        "retained",
        "worst attack, %",
        "by an opening alone",
    ]
    rows = [[*head, *benign]]
    for name, fields in ways:
        for seed in options.seeds.split(","):
            folder = options.out / f"{name.replace(' ', '-')}-{seed}"
            adapter, attacked = folder / "rr", folder / "attack"
            given = [*options.fields, *fields, f"seed={seed}"]
            run(["train", options.recipe, *given, "--allow-stuck", *machine], adapter)
            who = ["--model", model, "--adapter", adapter, *machine]
            asked = ["--behaviors", options.behaviors, "--attack", options.attack, "--steps", options.steps]
            run(["attack", *who, *asked], attacked)
            worst, opening = (cell(measured(attacked, condition=c)) for c in ("worst_case", "worst_case_opening"))
            row = [name, seed, *held_out(adapter), worst, opening]
            if options.benign:
                run(["eval", "over-refusal", *who, "--data", options.benign], folder / "benign")
                refused = measured(folder / "benign", "over_refusal", "")
                row += [cell(refused), "-" if refused is None else f"{refused.counts.get('gibberish', 0):g}"]
            rows.append(row)
            say(f"{name}, seed {seed}: done")
    print(table(rows))


def by_loss(names: list[str]) -> Ways:
    """The losses by name."""
    return [(one, [*ALIKE, f"circuit_breaker.loss={one}"]) for one in (loss_entry(name.strip()).name for name in names)]


def by_data(recipe: Recipe) -> Ways:
    """The recipe as it is and, of its sources, what the paper leaves out."""
    sources = list(enumerate(recipe.data.sources if isinstance(recipe.data, MixtureConfig) else []))
    kept = [f"data.sources.{i}.remove_request=0" for i, source in sources if source.remove_request]
    complying = [f"data.sources.{i}.refusals=false" for i, source in sources if source.refusals]
    ways = [("as they are", []), ("no request removed", kept), ("no refusals", complying)]
    return [(name, [*MEASURED, *fields]) for name, fields in ways if fields or name == "as they are"]


if __name__ == "__main__":
    script(main)
