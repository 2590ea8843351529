"""``mm-cb demo``: the paper's whole experiment on the miniature, from training the breaker to the page."""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mm_cb.attacks.checks import run_checks
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import as_artefact
from mm_cb.attacks.outputs import curve_quartiles, parts_of
from mm_cb.attacks.registry import attack_entry
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.threats import Threat
from mm_cb.core.beside import beside
from mm_cb.core.closing import Hint, files, say, what_next
from mm_cb.core.embedded import is_fiction
from mm_cb.core.errors import UserError
from mm_cb.core.pages import PAGE, refuse_other_page
from mm_cb.core.progress import Progress
from mm_cb.core.records import Check, Curve, Item, Representations
from mm_cb.core.runs import RunDirectory, append_jsonl, keep_pictures, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.inference.cached_chunks import once
from mm_cb.inference.questions import ask
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.observations import worst_pictures
from mm_cb.metrics.results import Measurement, measure, write_results
from mm_cb.miniature import NAME, data, language
from mm_cb.miniature.data import FictionQuestion
from mm_cb.miniature.making.sanity import judges_tell_apart, opening_is_said
from mm_cb.miniature.scoring import judge_behavior, score_question
from mm_cb.models import ChatModel, load_model
from mm_cb.models.cache import model_inputs
from mm_cb.training.recipes.config import Recipe
from mm_cb.training.recipes.recipe import deciding, load_recipe
from mm_cb.training.representations import compare
from mm_cb.training.run import train

_DIALLED = "pgd_homotopy"
CONDITIONS = ("no_attack", "noise", "pgd", "pgd_adaptive", "pgd_clean_teacher", _DIALLED, "pgd_facts")

_BATCH = 36
"""Behaviours attacked at once: the miniature's pictures are small."""
THREADS = 1
"""Fixed, so that equal runs add numbers in the same order; a second core works in a process of its own."""
LAST = CONDITIONS[-2:]
"""Attacks on a breaker that come when the second process has measured the base, and takes one of them."""
LOG = "log.txt"


@dataclass(frozen=True)
class DemoSize:
    """How much of everything; the same for every subject."""

    behaviors: tuple[int, int, int]
    """Trained brews, held-out combinations, held-out kind."""
    steps: int
    restarts: int
    multiple_choice: int
    """Questions per subject of the world (six)."""
    open_questions: int
    """Per category (three)."""
    look_alikes: int
    epsilon: int = 32
    representations: int = 60
    """Answers per set for the hidden-state figure."""


QUICK = DemoSize(behaviors=(24, 12, 12), steps=100, restarts=1, multiple_choice=50, open_questions=40, look_alikes=120)
FULL = DemoSize(behaviors=(60, 24, 24), steps=300, restarts=3, multiple_choice=150, open_questions=100, look_alikes=240)


def run_demo(
    out: Path,
    *,
    full: bool,
    seed: int,
    rr_seeds: int,
    model: str = NAME,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Run the experiment into ``out``, or go on with the one that is there; prints the table and the report's path.

    Args:
        out: Run directory.
        full: The whole size instead of the quick one.
        seed: Of behaviours, attacks and the first breaker's training.
        rr_seeds: Circuit breakers to train, from ``seed`` on; attacks on the base are shared.
        model: The miniature, or the folder of another model of its world.
        device: Torch device of every model.
        dtype: Of every model, in training and under attack.

    Raises:
        UserError: If the model is of no such world.
    """
    if not is_fiction(model):
        raise UserError(
            f"`--model` must be a model of the miniature's world, made by scripts/train_miniature.py, got `{model}`."
        )
    from mm_cb.report import judge_report, print_table, write_report
    from mm_cb.report.text import clean_text

    page = out / PAGE
    refuse_other_page(page)
    plan = FULL if full else QUICK
    rerouting = load_recipe(NAME, [f"model={model}", f"device={device}", f"dtype={dtype}"])
    recipe = {"full": full, "rr_seeds": rr_seeds, "fiction": True, "model": model, **dataclasses.asdict(plan)}
    recipe |= {"attacks": list(CONDITIONS), "attack": _budget(plan, seed, "pgd_adaptive")}
    recipe |= {"safety_prompt": language.SAFETY_PROMPT, "rerouting": deciding(rerouting)}
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    with RunDirectory(out, "demo", recipe, seed, inputs=model_inputs(model)) as run, Progress() as progress:
        if not run.finished:
            progress.say(_announce(plan, rr_seeds, run.path))
            _run(run.path, plan, rerouting, seed, rr_seeds, progress)
            run.finish(files=["curves.json", "representations.json"])
        data = write_report([run.path], page)
    print_table(data.measurements, strengths=data.strengths)
    told = clean_text(judge_report(data).told)
    for line in f"\n{told}\n{'' if full else _SHORT}".split("\n"):
        say(line)
    files({"report": page, "results": run.path / "results.json"})
    say(f"{(time.monotonic() - started) / 60:.1f} minutes")
    what_next(
        Hint(f"`{_DIALLED}` had no time here: with more steps it breaks more", _finishing(model, run.path)),
        Hint("whether your own model is supported; then docs/quickstart.md", ["doctor", "--model", "MODEL"]),
    )


_SHORT = (
    f"\nThis is the quick size: {QUICK.steps} steps, {QUICK.restarts} run of each attack. `--full` has {FULL.steps} "
    f"and {FULL.restarts}, and breaks more: docs/miniature.md.\n"
)
"""Said behind the quick run: a short attack flatters."""


def _finishing(model: str, out: Path) -> list[str | Path]:
    """What to type to give the attack the steps that there is no time for."""
    given: list[str | Path] = [
        "--adapter",
        out / "adapters" / rr_name(0),
        "--behaviors",
        out / "behaviors" / "behaviors.jsonl",
    ]
    budget: list[str | Path] = [
        "--attack",
        _DIALLED,
        "--steps",
        "1500",
        "--batch",
        "24",
        "--check-convergence",
        "12",
        "--out",
        Path(f"{out}-{_DIALLED}"),
    ]
    return ["attack", "--model", model, *given, *budget]


def _announce(plan: DemoSize, rr_seeds: int, out: Path) -> str:
    breakers = "a circuit breaker" if rr_seeds == 1 else f"{rr_seeds} circuit breakers"
    runs = "1 run" if plan.restarts == 1 else f"{plan.restarts} runs"
    return (
        f"Training {breakers} on the miniature, attacking {2 + rr_seeds} subjects with {sum(plan.behaviors)} "
        f"behaviours ({plan.steps} steps, {runs} at most, eps {plan.epsilon}/255), then measuring "
        f"what was kept. Into {out}; stop it any time, the same command goes on."
    )


def _budget(plan: DemoSize, seed: int, name: str) -> dict[str, object]:
    """One attack as a picture's JSON states it."""
    return as_artefact(_config(plan, seed, name), data.CANVAS)["attack"]


def _config(plan: DemoSize, seed: int, name: str) -> AttackConfig:
    """One attack at this size; the demo writes no JSON beside its pictures."""
    return AttackConfig(
        name,
        Threat("linf", plan.epsilon),
        plan.steps,
        plan.restarts,
        seed,
        batch=_BATCH,
        artefacts=False,
        checkpoint_seconds=None,
    )


def rr_name(index: int) -> str:
    """Subject name of the ``index``-th breaker."""
    return "rr" if index == 0 else f"rr-seed{index}"


def _run(out: Path, plan: DemoSize, rerouting: Recipe, seed: int, rr_seeds: int, progress: Progress) -> None:
    """Every stage in order, in two processes; then all that is finished is read back."""
    behaviors, questions = _behaviors(out, plan, seed), _questions(plan)
    attacks = [_config(plan, seed, name) for name in CONDITIONS]
    breakers = list[Subject]()
    with beside(_measure_base, out, plan, rerouting, seed, log=out / LOG):
        for index in range(rr_seeds):
            breakers.append(_breaker(out, rerouting, seed, index, progress))
            _attack(out, breakers[-1], behaviors, [a for a in attacks if a.name not in LAST], progress)
    for subject in breakers:
        with beside(_attack_last, out, plan, rerouting, seed, subject.name, log=out / LOG):
            _attack(out, subject, behaviors, [a for a in attacks if a.name != LAST[-1]], progress)
            _ask(out, subject, questions, progress)
    items: list[Item] = []
    curves: list[Curve] = []
    subjects = [*_base(rerouting), *breakers]
    silent = Progress(io.StringIO())
    for subject in subjects:
        attacked = _attack(out, subject, behaviors, attacks, silent)
        items += _with_pictures(out, subject, attacked) + _ask(out, subject, questions, silent)
        curves += _curves(out, subject, attacked)
    write_json(out / "representations.json", _representations(out, breakers[0], plan, rerouting))
    pairs = [(subject.name, "base") for subject in subjects if subject.name != "base"]
    measurements = measure(items, pairs=pairs)
    write_json(out / "curves.json", curves)
    write_json(out / "checks.json", _checks(items, measurements, subjects, behaviors, questions, plan.epsilon))
    write_jsonl(out / "items.jsonl", items)
    write_results(out / "results.json", measurements)


def _measure_base(out: Path, plan: DemoSize, rerouting: Recipe, seed: int) -> None:
    """Attack and ask the subjects without an adapter: work of the second process."""
    torch.set_num_threads(THREADS)
    behaviors, attacks = _behaviors(out, plan, seed), [_config(plan, seed, name) for name in CONDITIONS]
    with Progress() as progress:
        for subject in _base(rerouting):
            _attack(out, subject, behaviors, attacks, progress)
            _ask(out, subject, _questions(plan), progress)


def _attack_last(out: Path, plan: DemoSize, rerouting: Recipe, seed: int, name: str) -> None:
    """The second process's attack on a breaker."""
    torch.set_num_threads(THREADS)
    subject = Subject(name, _load(rerouting, out / "adapters" / name), adapted=True)
    with Progress() as progress:
        _attack(out, subject, _behaviors(out, plan, seed), [_config(plan, seed, LAST[-1])], progress)


def _checks(
    items: Sequence[Item],
    measurements: Sequence[Measurement],
    subjects: Sequence[Subject],
    behaviors: Sequence[Behavior],
    questions: Sequence[FictionQuestion],
    epsilon: int,
) -> list[Check]:
    """Every sanity check; one that fails leaves the verdict at "no claim"."""
    adapted = [subject for subject in subjects if subject.adapted]
    return [
        *run_checks(items, measurements, subjects[0], adapted, behaviors, epsilon),
        opening_is_said(items),
        judges_tell_apart(judge_behavior, score_question, behaviors, questions),
    ]


@contextmanager
def _timed(out: Path, stage: str) -> Iterator[None]:
    """Append a stage's seconds to ``timings.jsonl``, once for every start that came to the stage's end."""
    started = time.monotonic()
    yield
    append_jsonl(out / "timings.jsonl", {"stage": stage, "seconds": round(time.monotonic() - started, 1)})


def _behaviors(out: Path, plan: DemoSize, seed: int) -> list[Behavior]:
    path = out / "behaviors" / "behaviors.jsonl"
    if not path.is_file():
        data.write_behaviors(data.behaviors(plan.behaviors, seed), path.parent)
    return read_behaviors(path)


def _load(rerouting: Recipe, adapter: Path | None = None) -> ChatModel:
    return load_model(rerouting.model, adapter=adapter, device=rerouting.device, dtype=rerouting.dtype)


def _base(rerouting: Recipe) -> list[Subject]:
    """The base, and the base behind the safety prompt."""
    base = _load(rerouting)
    return [Subject("base", base), Subject("base+safety_prompt", base, system=language.SAFETY_PROMPT)]


def _breaker(out: Path, rerouting: Recipe, seed: int, index: int, progress: Progress) -> Subject:
    """The ``index``-th breaker, trained or found."""
    name = rr_name(index)
    recipe = rerouting.model_copy(update={"seed": seed + index})
    with _timed(out, f"train {name}"):
        adapter = train(recipe, out / "adapters" / name, progress=progress)
    torch.set_num_threads(THREADS)
    return Subject(name, _load(rerouting, adapter), adapted=True)


def _attack(
    out: Path, subject: Subject, behaviors: Sequence[Behavior], attacks: Sequence[AttackConfig], progress: Progress
) -> list[Item]:
    """Those attacks that fit the subject."""
    items: list[Item] = []
    for attack in attacks:
        if attack.name == "pgd_adaptive" and not subject.adapted:
            # Without an adapter, teacher and student are one model: the distance and its gradient are zero, the
            # attack is PGD. Its results stand for it.
            plain = [item for item in items if item["condition"] == "pgd"]
            stand_ins: list[Item] = [{**item, "condition": attack.name, "same_as": "pgd"} for item in plain]
            items += stand_ins
            continue
        if attack.entry.needs_adapter and not subject.adapted:
            continue  # it is aimed at what an adapter changed
        with _timed(out, f"{attack.name} {subject.name}"):
            items += attack_behaviors(subject, behaviors, attack, _folder(out, subject), judge_behavior, progress)
    return items


def _folder(out: Path, subject: Subject) -> Path:
    return out / "attacks" / subject.name


def _with_pictures(out: Path, subject: Subject, items: list[Item]) -> list[Item]:
    """Items with image paths relative to ``out``; the worst picture of each is kept by its id."""
    searched = (item for item in items if attack_entry(item["condition"]).searches_pixels)
    keep_pictures(_folder(out, subject), worst_pictures(searched))
    folder = _folder(out, subject).relative_to(out)
    for item in items:
        item["image"], item["clean_image"] = f"{folder}/{item['image']}", f"{folder}/{item['clean_image']}"
        item["candidates"] = [{**c, "image": f"{folder}/{c['image']}"} for c in item["candidates"] or ()]
    return items


def _curves(out: Path, subject: Subject, items: Sequence[Item]) -> list[Curve]:
    """The loss curves of the attacks that these items are of."""
    parts = parts_of(_folder(out, subject))
    names = dict.fromkeys(item["condition"] for item in items if "same_as" not in item)
    return [curve for name in names for curve in curve_quartiles(parts, subject.name, name)]


def _questions(plan: DemoSize) -> list[FictionQuestion]:
    """Capability and over-refusal items, the same for every subject."""
    return [
        *data.multiple_choice_questions(plan.multiple_choice),
        *data.open_questions(plan.open_questions),
        *data.look_alikes(count=plan.look_alikes),
    ]


def _ask(out: Path, subject: Subject, questions: Sequence[FictionQuestion], progress: Progress) -> list[Item]:
    """Capability and over-refusal of one subject."""
    folder = out / "capability" / subject.name
    return [
        item
        for name, group in itertools.groupby(questions, key=lambda question: question.metric)
        for item in ask(subject, list(group), score_question, folder, progress, name=name)
    ]


def _representations(out: Path, subject: Subject, plan: DemoSize, rerouting: Recipe) -> Representations:
    """Cosine and norm by layer, adapter on against off, on harmful, held-out and benign answers."""

    def compute() -> Representations:
        n = plan.representations
        chosen = {
            name: data.behaviors(counts, seed=7)
            for name, counts in {
                "circuit_breaker": (n, 0, 0),
                "held_out_combination": (0, n, 0),
                "held_out_kind": (0, 0, n),
            }.items()
        }
        chosen["retain"] = [*data.open_questions(n // 6, seed=7), *data.look_alikes(seed=7, count=n // 2)]
        sets = {}
        for name, questions in chosen.items():
            texts = [q.prompt for q in questions], [q.picture for q in questions], [q.reference for q in questions]
            sets[name] = compare(subject.model, *texts)
        return {
            "layers": list(range(len(subject.model.decoder_blocks) + 1)),
            "target_layers": rerouting.circuit_breaker.target_layers,
            "lora_blocks": rerouting.lora.layers_to_transform,
            "sets": sets,
        }

    found: Representations = once(out / "parts" / "representations.json", compute)
    return found
