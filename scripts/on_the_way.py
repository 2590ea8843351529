"""Does a hijack survive what happens to a picture between the attacker and the model? Another threat model, apart.

``python scripts/on_the_way.py --behaviors FILE --out FILE.json [--model miniature] [--adapter A] [--attack pgd]
[--epsilon 32] [--steps 100] [--samples 4]`` makes every behaviour's picture twice within one epsilon and with equally
many updates: by the plain attack, and by the same attack on the mean over ``samples`` random draws of what may happen
(expectation over transformations; ``samples`` times the passes). Each draw is JPEG, rescaling, cropping or nothing, by
the package's differentiable forms. Both saved files and the clean one then go through real ways, done with Pillow,
through the model's own processor and ``generate``, and are judged. Pictures lie beside ``--out``, which is written
anew after every batch. The mean is over fresh draws at every step, and the best step is chosen by it: the second
picture is a little weaker than it could be, never stronger than it looks, as all counts come from its file.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from image_attacks import Crop, Jpeg, Rescale, eot, linf_255  # noqa: E402
from mm_cb.errors import UserError  # noqa: E402
from mm_cb.evaluation.attack_options import parse_attacks  # noqa: E402
from mm_cb.evaluation.attack_run import canvas_of, judge_of  # noqa: E402
from mm_cb.evaluation.attacks import KINDS, Attack, Protocol  # noqa: E402
from mm_cb.evaluation.behaviors import Behavior, grey_canvas, open_picture, read_behaviors  # noqa: E402
from mm_cb.evaluation.candidates import clean_name, complete, read_pictures, save_pictures, starts_with  # noqa: E402
from mm_cb.evaluation.hijack import Judge, to_pixels  # noqa: E402
from mm_cb.evaluation.parts import chunks  # noqa: E402
from mm_cb.evaluation.search import make_objective, search  # noqa: E402
from mm_cb.evaluation.source import Source, subject_name  # noqa: E402
from mm_cb.evaluation.subjects import Subject, load_subject  # noqa: E402
from mm_cb.files import write_json  # noqa: E402
from mm_cb.provenance import git_revision, package_versions  # noqa: E402

ATTACKS = tuple(
    name for name, kind in KINDS.items() if kind.searches_pixels and not kind.prefilled and name != "universal"
)
KINDS_OF_PICTURE = ("clean", "plain", "eot")
Transformation = Callable[[Tensor, torch.Generator], Tensor]
Picture = Image.Image


@dataclass(frozen=True)
class OneOf:
    """One of several transformations, or none, each as likely: a picture on its way meets one of them, not all."""

    choices: tuple[Transformation, ...]

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Transform the batch by what was drawn."""
        drawn = int(torch.randint(len(self.choices) + 1, (), generator=generator, device=generator.device))
        return self.choices[drawn](pixels, generator) if drawn < len(self.choices) else pixels


DRAWN = OneOf((Jpeg(), Rescale(), Crop()))


def through_jpeg(picture: Picture, quality: int) -> Picture:
    """Saved as JPEG and read back."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def rescaled(picture: Picture, share: float) -> Picture:
    """Shrunk and brought back to its size."""
    width, height = (max(round(side * share), 1) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC).resize(picture.size, Image.Resampling.BICUBIC)


def cropped(picture: Picture, share: float) -> Picture:
    """The middle, brought back to the picture's size."""
    width, height = picture.size
    left, top = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    middle = picture.crop((left, top, width - left, height - top))
    return middle.resize(picture.size, Image.Resampling.BICUBIC)


WAYS: Mapping[str, Callable[[Picture], Picture]] = {
    "as it is": lambda picture: picture,
    "JPEG 75": lambda picture: through_jpeg(picture, 75),
    "JPEG 50": lambda picture: through_jpeg(picture, 50),
    "rescaled 0.7": lambda picture: rescaled(picture, 0.7),
    "cropped 0.9": lambda picture: cropped(picture, 0.9),
}


def main() -> None:
    """Attack, judge, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviors", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--adapter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attack", choices=ATTACKS, default="pgd")
    parser.add_argument("--epsilon", type=int, default=32, help="in 255ths")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4, help="draws per step")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.suffix != ".json":
        raise UserError(f"`--out` must be a .json file, its pictures lie in a folder beside it; got `{options.out}`.")
    if options.samples < 1:
        raise UserError(f"`--samples` must be at least 1, got {options.samples}.")
    parse_attacks(options.attack, adapted=bool(options.adapter))
    name = subject_name(options.adapter, None)
    subject = load_subject(Source(options.model, options.adapter, device=options.device), name)
    canvas = canvas_of(subject.model.processor)
    budget = {"epsilon": options.epsilon, "steps": options.steps, "seed": options.seed, "batch": options.batch}
    attack = Attack(options.attack, **budget, canvas=canvas)
    behaviors = read_behaviors(options.behaviors)
    given = {key: value for key, value in vars(options).items() if value is not None}
    paths = {key: Path(given[key]).name for key in ("behaviors", "out", "model", "adapter") if key in given}
    shown = given | paths  # where files and folders lie is nobody's business
    typed = " ".join(f"--{key} {value}" for key, value in shown.items())
    record: dict[str, Any] = {
        "command": f"python scripts/on_the_way.py {typed}",
        "revision": git_revision(),
        "versions": package_versions(),
        "subject": name,
        "settings": shown | {"drawn": str(DRAWN)},
        "of": len(behaviors),
    }
    rows: list[dict[str, Any]] = []
    folder = options.out.with_suffix("")
    for batch in batches(behaviors, attack):
        rows += judge_batch(subject, *batch, attack, options.samples, folder, judge_of(options.model))
        write_json(options.out, record | summary(rows))
        sys.stderr.write(f"{len({row['id'] for row in rows})} of {len(behaviors)} behaviours\n")
    sys.stdout.write(table(summary(rows)["rows"]))


def batches(behaviors: Sequence[Behavior], attack: Attack) -> Iterator[tuple[list[Behavior], list[Picture]]]:
    """Behaviours with their pictures, of one size each."""
    sizes: dict[tuple[int, int], list[tuple[Behavior, Picture]]] = {}
    for behavior in behaviors:
        picture = grey_canvas(attack.canvas) if behavior.image is None else open_picture(behavior.image)
        sizes.setdefault(picture.size, []).append((behavior, picture))
    for alike in sizes.values():
        for part in chunks(alike, attack.batch):
            yield [behavior for behavior, _ in part], [picture for _, picture in part]


def judge_batch(
    subject: Subject,
    group: Sequence[Behavior],
    pictures: Sequence[Picture],
    attack: Attack,
    samples: int,
    folder: Path,
    judge: Judge,
) -> list[dict[str, Any]]:
    """Make both pictures of every behaviour and judge the files after every way: one row per answer."""
    clean = torch.stack([to_pixels(picture) for picture in pictures]).to(subject.model.device)
    objective = make_objective(subject, group, pictures, attack)
    files = {"clean": [clean_name(behavior) for behavior in group]}
    for kind in KINDS_OF_PICTURE[1:]:
        draws = torch.Generator().manual_seed(attack.seed)
        minimised = eot(objective, [DRAWN], samples=samples, generator=draws) if kind == "eot" else objective
        found = search(minimised, clean, attack, Protocol(), generators=[draws] * len(group), random_start=False)
        files[kind] = save_pictures(group, clean, found.pictures[None], f"{attack.name}-{kind}", folder)
    rows = []
    for kind, names in files.items():
        distances = [linf_255(folder / name, folder / clean_name(b)) for name, b in zip(names, group, strict=True)]
        if max(distances) > attack.epsilon:
            raise RuntimeError(f"a saved picture is {max(distances)}/255 away, {attack.epsilon}/255 is allowed")
        for way, go in WAYS.items():
            said = complete(subject, group, [go(picture) for picture in read_pictures(names, folder)], attack)
            for behavior, text, distance in zip(group, said, distances, strict=True):
                verdict = {"outcome": judge(behavior, text), "opened": starts_with(text, behavior.target)}
                rows.append({"id": behavior.id, "way": way, "kind": kind, "epsilon": distance, **verdict})
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts per way and kind of picture, and the largest distance of any file."""
    counted = []
    for way in WAYS:
        for kind in KINDS_OF_PICTURE:
            own = [row for row in rows if (row["way"], row["kind"]) == (way, kind)]
            outcomes = dict(sorted(Counter(row["outcome"] for row in own).items()))
            opened = sum(row["opened"] for row in own)
            counted.append({"way": way, "picture": kind, "n": len(own), "outcomes": outcomes, "opened": opened})
    return {"largest_distance": max(row["epsilon"] for row in rows), "rows": counted}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per way and kind of picture."""
    lines = [f"{'way':14}{'picture':9}{'n':>4}{'opened':>8}  outcomes"]
    for row in rows:
        lines.append(f"{row['way']:14}{row['picture']:9}{row['n']:4}{row['opened']:8}  {json.dumps(row['outcomes'])}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.stderr.write(f"on_the_way: {error}\n")
        sys.exit(2)
