"""What this machine can run, said plainly."""

import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mm_cb.core import provenance
from mm_cb.core.embedded import guests
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.sizes import told_size

if TYPE_CHECKING:
    from mm_cb.training.planning.plan import TrainingPlan
    from mm_cb.training.recipes.config import Recipe

_GIB = 2**30
_NAME = 30
"""Columns of names; a longer one has its row to itself."""
_POSSIBLE: Mapping[bool | None, str] = {True: "yes", False: "no", None: "absent"}
"""The states of a quick look at a model, where nothing is a problem."""
_STATES: Mapping[bool | None, str] = {True: "ok", False: "PROBLEM", None: "absent"}
NEVER_PUBLISHED = "multimodal-circuit-breakers.jsonl"
"""The image-text pairs that the paper trains on, as the recipes name them."""
_EXTRAS = (
    ("quant", "bitsandbytes", "4-bit weights"),
    ("gguf", "gguf", "the real model of mm-cb demo --real"),
    ("data", "sacrebleu", "contamination checks"),
    ("judge", "openai", "models and judges behind an address"),
)


_PAIRS = (
    "mm-cb data build pairs --images PICTURES --template my.txt --describer llava-hf/llava-v1.6-mistral-7b-hf "
    "--generator-url URL --generator NAME --out pairs",
    f"mm-cb train --show RECIPE | sed 's#{NEVER_PUBLISHED}#pairs/pairs.jsonl#' > my.yaml",
)
"""What makes the set of image-text pairs that the paper trains on."""


def _calls(set_: str, folder: str, file: str) -> tuple[str, str]:
    """What makes one of the two sets of tool calls."""
    return (
        "mm-cb data build calls --functions functions.jsonl --request-template ask.txt --call-template do.txt "
        f"--requester-url URL --requester NAME --set {set_} --out {folder}",
        f"cp {folder}/calls.jsonl {file}",
    )


_BUILT = {
    NEVER_PUBLISHED: _PAIRS,
    "harmful-calls.jsonl": _calls("circuit_breaker", "harmful", "harmful-calls.jsonl"),
    "calls.jsonl": _calls("retain", "harmless", "calls.jsonl"),
}
"""Files that recipes name and nobody has published → the commands that make them."""


class Finding(NamedTuple):
    """One row of the table."""

    name: str
    """What was looked at."""
    ok: bool | None
    """Whether it is fine; None = absent, and not asked for."""
    detail: str
    """What was seen."""
    source: str = ""
    """The address that it is published at."""
    get: tuple[str, ...] = ()
    """Commands that get or mend it, as a shell takes them."""


def print_findings(recipe: str | None = None, model: str | None = None) -> bool:
    """Print the table; returns whether everything that mm-cb, the recipe or the model needs here is fine.

    Args:
        recipe: Say what it needs as well.
        model: Have a quick look at this model, and at nothing else unless a recipe is asked for.

    Raises:
        UserError: If there is no such recipe or model, or they do not fit one another, or are not supported.
    """
    from mm_cb.core.closing import Hint, what_next

    findings, steps = [], []
    if recipe is not None:
        from mm_cb.training.recipes.recipe import load_recipe

        findings = machine() + examine_recipe(load_recipe(recipe))
        steps = [Hint("what would be trained, and how", ["train", recipe, "--dry-run"])]
    elif model is None:
        findings = examine()
        steps = [
            Hint("a breaker of the embedded miniature, attacked, on one page; minutes", ["demo"]),
            Hint("a quick look at a model of yours", ["doctor", "--model", "M"]),
        ]
    if model is not None:
        from mm_cb.attacks.quick_look import look

        seen = look(model)
        print_rows([Finding(*row) for row in seen.rows], _POSSIBLE)
        yours = any("rows.jsonl" in word for word in seen.train)
        where = "" if not yours or "device=cpu" in seen.train else ", on a GPU"
        said = "; rows.jsonl stands for your rows, see docs/formats.md" if yours else ""
        steps = steps or [Hint(f"a breaker for it{where}{said}", seen.train)]
    print_rows(sorted(findings, key=lambda one: one.ok is not False))
    fine = all(finding.ok is not False for finding in findings)
    what_next(*(steps if fine else [Hint("mend each PROBLEM, then the same command again", [])]))
    return fine


def print_laws(model: str) -> None:
    """Load a model that sees and print a line for each law that training and attacks rest on.

    Raises:
        UserError: If it is not here, sees nothing, or breaks a law: no claim of an attack on it would mean anything.
    """
    from mm_cb.training.model_laws import ask

    kept = ask(model)
    print_rows([Finding(*one) for one in kept])
    if broken := [one for one in kept if not one.ok]:
        raise UserError(
            f"`{model}` breaks {len(broken)} of {len(kept)} laws, so that no number of training or attacks on it "
            "can be relied on; take its files from the published folder, or see docs/add_a_model.md."
        )


def print_rows(findings: Sequence[Finding], states: Mapping[bool | None, str] = _STATES) -> None:
    """Print rows that fit the terminal and break no word; addresses and commands have lines of their own."""
    from mm_cb.core.closing import shell, wrapped
    from mm_cb.core.terminal import columns, printable, put

    width = columns()
    longest = min(max((len(printable(finding.name)) for finding in findings), default=0), _NAME)
    for finding in findings:
        head = f"{printable(finding.name):{longest}}  {states[finding.ok]:7}  "
        words = printable(finding.detail)
        beside = max(map(len, words.split()), default=0) <= width - len(head) and len(finding.name) <= longest
        room, indent = (width - len(head), " " * len(head)) if beside else (width - 4, "    ")
        lines = wrapped(words, room)
        put(head + lines[0] if beside else head.rstrip())
        for line in lines[1:] if beside else lines:
            put(indent + line)
        if finding.source:
            put(f"    {finding.source}")
        for command in finding.get:
            put(shell(printable(command), "    "))


def machine() -> list[Finding]:
    """Look at packages, extras, GPU, memory and disk: a row each, and one for every package that is a problem."""
    packages = [*_packages(), _torchvision()]
    fine = Finding("packages", True, "; ".join(f"{one.name} {one.detail}" for one in packages if one.ok))
    return [*(one for one in packages if not one.ok), fine, _extras_together(), _gpu(), _memory(), _disk()]


def examine() -> list[Finding]:
    """Look at the machine, and at embedded models, models of recipes and data sets."""
    return [*machine(), *(_embedded(guest.name) for guest in guests()), *_models(), _data()]


def examine_recipe(recipe: "Recipe") -> list[Finding]:
    """What a recipe needs on this machine, what of it is missing, and what would fit.

    Raises:
        UserError: If the model's shape cannot be known here, or the recipe does not fit it.
    """
    from mm_cb.training.planning.plan import make_plan

    plan = make_plan(recipe)
    return [
        Finding(f"{recipe.name}: adapter", True, f"{len(plan.paths)} modules, {plan.parameters:,} parameters"),
        _weights(f"{recipe.name}: weights", recipe.model),
        _fits(plan),
        *_needed_extras(recipe),
        *_needed_data(recipe),
    ]


def _fits(plan: "TrainingPlan") -> Finding:
    """Whether the recipe's device is here and has room, and what would fit if not."""
    import torch

    recipe, needed = plan.recipe, plan.memory()
    name, need = f"{recipe.name}: memory", f"about {needed}"
    if not recipe.device.startswith("cuda"):
        free = float(provenance.memory_bytes())
    elif torch.cuda.is_available():
        free = float(torch.cuda.mem_get_info(recipe.device)[0])
    else:
        sizes = [f"{gib} GiB: {' '.join(plan.fitting(gib * _GIB)) or 'nothing'}" for gib in (8, 12, 16, 24, 80)]
        return Finding(name, False, f"{need}; no GPU here; what fits on a GPU of {', '.join(sizes)}")
    if needed.total <= free:
        return Finding(name, True, f"{need}; {told_size(free)} are free")
    smaller = " ".join(plan.fitting(free)) or "no setting of this recipe"
    return Finding(name, False, f"{need}; {told_size(free)} are free, where this fits: {smaller}")


def _weights(name: str, model: str) -> Finding:
    from mm_cb.models.cache import absent_files, weight_files

    absent = absent_files(model)
    if not absent:
        try:
            weight_files(model)
        except UserError as error:  # not whole
            return Finding(name, False, str(error))
        return Finding(name, True, f"`{model}` is here")
    lacks = Finding(name, False, f"`{model}` lacks {', '.join(absent[:3])}")
    if Path(model).is_absolute() or len(Path(model).parts) != 2:
        return lacks
    return lacks._replace(source=f"https://huggingface.co/{model}", get=(f"hf download {model}",))


def _needed_extras(recipe: "Recipe") -> list[Finding]:
    needed = recipe.quantize == "4bit"
    return [finding._replace(ok=find_spec("bitsandbytes") is not None) for finding in _extras()[:1] if needed]


def _needed_data(recipe: "Recipe") -> list[Finding]:
    from mm_cb.core.hub import offline
    from mm_cb.training.inputs import absent_data

    name = f"{recipe.name}: data"
    try:
        with offline():  # what is here; nothing is fetched
            states = absent_data(recipe)
    except UserError as e:
        return [Finding(name, False, str(e))]
    found = [
        _data_finding(name, source, not absent, absent or f"`{source}` is here") for source, absent in states.items()
    ]
    return [
        finding._replace(get=tuple(line.replace("RECIPE", recipe.name) for line in finding.get)) for finding in found
    ]


def _data_finding(name: str, source: str, ok: bool | None, detail: str) -> Finding:
    """A data set's row, with how to get one that is not here."""
    from mm_cb.data.cards import cards, whereabouts

    if ok:
        return Finding(name, ok, detail)
    if (built := _BUILT.get(source)) is not None:
        return Finding(name, ok, f"`{source}` was never published; this makes one:", get=built)
    if (card := cards().get(source)) is None:
        return Finding(name, ok, detail)
    if ok is False and not whereabouts(card)[0]:
        detail = f"`{source}` is not here"
    return Finding(name, ok, detail, card.source.partition(", ")[0], card.how)


def _extras() -> list[Finding]:
    """Optional packages; one that is missing is no problem, unless a recipe needs it."""
    return [
        Finding(
            f"extra `{extra}`",
            True if find_spec(package) else None,
            f"{package} is here" if find_spec(package) else f"not installed: {use}",
            get=() if find_spec(package) else (f"pip install -e '.[{extra}]'",),
        )
        for extra, package, use in _EXTRAS
    ]


def _extras_together() -> Finding:
    """All of them in a row: those that are not here with what each is for, and the command that gets them."""
    absent = [extra for (extra, _, _), found in zip(_EXTRAS, _extras(), strict=True) if not found.ok]
    if not absent:
        return Finding("extras", True, ", ".join(extra for extra, _, _ in _EXTRAS))
    told = ", ".join(f"{extra} ({use})" for extra, _, use in _EXTRAS if extra in absent)
    return Finding("extras", None, f"not installed: {told}", get=(f"pip install -e '.[{','.join(absent)}]'",))


def _models() -> list[Finding]:
    """The models of the shipped recipes: a row for all that are here or not, and one for each that is not whole."""
    from mm_cb.core.recipe_files import recipe_names
    from mm_cb.training.recipes.recipe import load_recipe

    names = {load_recipe(name).model for name in recipe_names()} - {guest.name for guest in guests()}
    found = {name: _weights("model", name) for name in sorted(names)}
    here = [name for name, one in found.items() if one.ok]
    damaged = [one._replace(ok=None) for one in found.values() if not one.ok and not one.get]
    absent = len(found) - len(here) - len(damaged)
    told = _told(here, absent, "models of the recipes")
    if not absent:
        return [Finding("models", True, told), *damaged]
    return [Finding("models", True if here else None, told, get=("mm-cb doctor --recipe RECIPE",)), *damaged]


def _data() -> Finding:
    """The data sets that have a card, here or not."""
    from mm_cb.data.cards import cards, whereabouts

    here = [name for name, card in cards().items() if whereabouts(card)[0]]
    absent = len(cards()) - len(here)
    told = _told(here, absent, "that we have a card of")
    return Finding("data sets", True if here else None, told, get=("mm-cb data list",) if absent else ())


def _told(here: Sequence[str], absent: int, which: str) -> str:
    found = f"here: {', '.join(here)}; " if here else ""
    return f"{found}{absent} {which} are not here; how to get them:" if absent else found.rstrip("; ")


def _packages() -> list[Finding]:
    return [
        Finding(name, version is not None, version or "not installed", get=() if version else ("pip install -e .",))
        for name, version in provenance.package_versions().items()
        if name != "torchvision"
    ]


def _torchvision() -> Finding:
    from mm_cb.core.torchvision import declare_operators

    version = provenance.package_versions()["torchvision"]
    state = declare_operators()
    detail = {
        "absent": "not installed; images are prepared with the PIL backend",
        "compiled": f"{version}, compiled part loads",
        "declared": f"{version}, compiled part does not fit this torch build; works, mm-cb declares what is missing",
    }[state]
    return Finding("torchvision", True, detail)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", True, "none visible to torch; enough for the miniature, not for a 7B model")
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
    return Finding("GPU", True, "; ".join(names))


def _memory() -> Finding:
    gib = provenance.memory_bytes() / _GIB
    ok = gib >= 3
    return Finding("memory", ok, f"{gib:.1f} GiB" + ("" if ok else "; the demo needs 3 GiB"))


def _disk() -> Finding:
    gib = provenance.free_disk_bytes(Path.cwd()) / _GIB
    ok = gib >= 1
    return Finding("disk", ok, f"{gib:.1f} GiB free here" + ("" if ok else "; the demo needs 1 GiB") + _writable())


def _writable() -> str:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return ""
    except OSError:
        return ", but this directory is not writable: give --out"


def _embedded(name: str) -> Finding:
    try:
        from mm_cb.models import load_model

        model = load_model(name)
        count = sum(parameter.numel() for parameter in model.model.parameters())
    except Exception as e:  # whatever it is, the table says it
        return Finding(name, False, f"does not load: {one_line(str(e))[:200]}")
    return Finding(name, True, f"loads, {count / 1e6:.1f} million parameters")
