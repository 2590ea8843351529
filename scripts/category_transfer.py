"""Train one breaker for each category of harmful rows, attack each with the behaviours of all, and print the matrix.

    python scripts/category_transfer.py RECIPE --retain RETAIN.jsonl --category NAME=ROWS.jsonl,BEHAVIORS.jsonl ...
        --out DIR [--attack all] [--steps 300] [--device cuda] [--dtype bfloat16] [KEY=VALUE ...]
    python scripts/category_transfer.py miniature --miniature --out DIR      # its four kinds, files written below DIR

ROWS are circuit-breaker rows of the category, RETAIN the retain rows of all, in our own format (docs/formats.md). Rows
of the printed table are what was trained on, columns what was asked; `none` is the base. Every step is an mm-cb command
in a folder of its own below DIR: stopped at any time, the same command goes on. A model without exact judge leaves
answers not judged: `mm-cb judge` each run, then give the command again for the table.

Source:
    Zou et al. 2024 (arXiv:2406.04313), category transfer: six categories by six.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from _commands import cell, measured, run, table

from mm_cb.cli.failures import script
from mm_cb.core.closing import say
from mm_cb.core.errors import UserError
from mm_cb.data.examples import Example
from mm_cb.training.recipes.recipe import load_recipe

Category = tuple[str, Path, Path]


def main() -> None:
    """Run what is not done yet, and print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("fields", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--retain", type=Path)
    parser.add_argument("--category", action="append", default=[], metavar="NAME=ROWS,BEHAVIORS")
    parser.add_argument("--miniature", action="store_true", help="the embedded model's kinds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attack", default="all")
    parser.add_argument("--steps", default="300")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_intermixed_args()
    try:
        retain, categories = (miniature(options.out / "data")) if options.miniature else given(options)
    except UserError as error:
        parser.error(str(error))
    machine = ["--device", options.device, "--dtype", options.dtype]
    model = load_recipe(options.recipe, options.fields).model
    asked = ["--attack", options.attack, "--steps", options.steps, *machine]
    rows = [["trained on", *(name for name, _, _ in categories)]]
    for trained, own, _ in [("none", retain, retain), *categories]:
        folder, who = options.out / trained, ["--model", model]
        if trained != "none":
            data = f"data=[{own.resolve()}, {retain.resolve()}]"
            run(["train", options.recipe, *options.fields, data, "--allow-stuck", *machine], folder / "rr")
            who += ["--adapter", str(folder / "rr")]
        row = [trained]
        for name, _, behaviors in categories:
            run(["attack", *who, "--behaviors", behaviors, *asked], folder / f"attack-{name}")
            row.append(cell(measured(folder / f"attack-{name}")))
            say(f"trained on {trained}, asked {name}: {row[-1]}")
        rows.append(row)
    print(table(rows))


def given(options: argparse.Namespace) -> tuple[Path, list[Category]]:
    """The files that the command line names.

    Raises:
        UserError: If one is missing or a name comes twice.
    """
    found: list[Category] = []
    for text in options.category:
        name, _, files = text.partition("=")
        rows, _, behaviors = files.partition(",")
        if not name or name == "none" or "/" in name or not behaviors or name in {one[0] for one in found}:
            raise UserError(f"--category must be NAME=ROWS.jsonl,BEHAVIORS.jsonl, each name once, got `{text}`.")
        found.append((name, Path(rows), Path(behaviors)))
    if len(found) < 2 or options.retain is None:
        raise UserError("two or more --category and --retain are needed (or --miniature).")
    for file in [options.retain, *(file for one in found for file in one[1:])]:
        if not file.is_file():
            raise UserError(f"`{file}` is not there.")
    return options.retain, found


def miniature(folder: Path) -> tuple[Path, list[Category]]:
    """The embedded model's rows and behaviours by their kind, as files."""
    from mm_cb.miniature.data import behaviors, training_examples, write_behaviors
    from mm_cb.miniature.language import instructions
    from mm_cb.miniature.world import FORBIDDEN_KINDS, HELD_OUT_KIND, brews

    kinds = [kind for kind in FORBIDDEN_KINDS if kind != HELD_OUT_KIND]
    files = [(kind, folder / f"{kind}.jsonl", folder / f"{kind}-behaviors" / "behaviors.jsonl") for kind in kinds]
    if not all(file.exists() for _, rows, asked in files for file in (rows, asked)):
        examples, asked_for = training_examples(0), behaviors((SIZE, SIZE, 0))
        said = {kind: [instructions(brew) for brew in brews((kind,))] for kind in kinds}
        write_rows(folder / "retain.jsonl", (e for e in examples if e.set == "retain"))
        for kind, rows, asked in files:
            harmful = (e for e in examples if e.set == "circuit_breaker" and e.source != REMOVED)
            write_rows(rows, (e for e in harmful if any(text in str(e.messages[-1]) for text in said[kind])))
            write_behaviors([b for b in asked_for if b.brew is not None and b.brew.kind == kind], asked.parent)
    return folder / "retain.jsonl", files


REMOVED = "miniature request removed"
"""Rows without a request, which files do not hold: half of each kind's, so that the paper's removal is not in this."""
SIZE = 48
"""Requests that are drawn of trained brews, and as many of held-out combinations; those of a kind are asked."""


def write_rows(file: Path, examples: Iterator[Example]) -> None:
    """Rows in our own format, pictures beside them."""
    (file.parent / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for example in examples:
        names = [f"pictures/{example.id}-{i}.png" for i in range(len(example.images))]
        for name, image in zip(names, example.open_images(), strict=True):
            image.save(file.parent / name)
        told = {"id": example.id, "messages": example.messages, "images": names, "set": example.set}
        lines.append(json.dumps({**told, "source": example.source}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    script(main)
