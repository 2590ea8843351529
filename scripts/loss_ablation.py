"""Train one recipe with several losses and seeds, attack every breaker, and print one table (the paper's Table 8).

    python scripts/loss_ablation.py RECIPE --behaviors F --out DIR [--losses rr,rand_p] [--seeds 0,1,2]
        [--attack all] [--steps 300] [--benign REQUESTS.jsonl] [--device cuda] [--dtype bfloat16] [KEY=VALUE ...]

Every step is an mm-cb command in a folder of its own below DIR: stopped at any time, the same command goes on. All
losses get the same steps, rates and rows; the length term and the adversary, which not every loss takes, are off for
all. KEY=VALUE are recipe fields. A model without exact judge leaves answers not judged: `mm-cb judge` each run, then
give the command again for the table.
"""

import argparse
from pathlib import Path

from _commands import cell, held_out, measured, run, table

from mm_cb.core.closing import say
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.registry import loss_entry, loss_names

ALIKE = ["circuit_breaker.keep_length=0", "circuit_breaker.adversary.steps=0", "training.held_out=null"]


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("fields", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--behaviors", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--losses", default=",".join(loss_names()))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--attack", default="all")
    parser.add_argument("--steps", default="300")
    parser.add_argument("--benign", help="requests for `mm-cb eval over-refusal`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_intermixed_args()
    machine = ["--device", options.device, "--dtype", options.dtype]
    model = load_recipe(options.recipe, [*ALIKE, *options.fields]).model
    losses = [loss_entry(name.strip()).name for name in options.losses.split(",")]
    benign = ["benign requests refused, %", "broken"] if options.benign else []
    head = ["loss", "seed", "held-out cosine: rerouted", "retained", "worst attack, %", "by an opening alone"]
    rows = [[*head, *benign]]
    for loss in losses:
        for seed in options.seeds.split(","):
            folder = options.out / f"{loss}-{seed}"
            adapter, attacked = folder / "rr", folder / "attack"
            fields = [*ALIKE, *options.fields, f"circuit_breaker.loss={loss}", f"seed={seed}"]
            run(["train", options.recipe, *fields, "--allow-stuck", *machine], adapter)
            who = ["--model", model, "--adapter", adapter, *machine]
            asked = ["--behaviors", options.behaviors, "--attack", options.attack, "--steps", options.steps]
            run(["attack", *who, *asked], attacked)
            worst, opening = (cell(measured(attacked, condition=c)) for c in ("worst_case", "worst_case_opening"))
            row = [loss, seed, *held_out(adapter), worst, opening]
            if options.benign:
                run(["eval", "over-refusal", *who, "--data", options.benign], folder / "benign")
                refused = measured(folder / "benign", "over_refusal", "")
                row += [cell(refused), "-" if refused is None else f"{refused.counts.get('gibberish', 0):g}"]
            rows.append(row)
            say(f"{loss}, seed {seed}: done")
    print(table(rows))


if __name__ == "__main__":
    main()
