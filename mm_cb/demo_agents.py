"""``mm-cb demo --agents``: the miniature agent, its breaker, and screens changed until it makes forbidden calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.run import attack
from mm_cb.attacks.threats import Threat
from mm_cb.benchmarks.runner import evaluate
from mm_cb.core.beside import beside
from mm_cb.core.checked import read_records
from mm_cb.core.closing import Hint, files, say, what_next
from mm_cb.core.errors import UserError
from mm_cb.core.pages import PAGE, refuse_other_page
from mm_cb.core.progress import Progress
from mm_cb.core.records import Item
from mm_cb.core.runs import write_json
from mm_cb.core.terminal import put
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics.agreement import completions_of
from mm_cb.metrics.results import Measurement, find, read_results
from mm_cb.metrics.statistics import wilson_interval
from mm_cb.miniature import AGENT
from mm_cb.miniature.agent import data
from mm_cb.miniature.agent.judge import outcome
from mm_cb.miniature.language import SAFETY_PROMPT
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train

THREADS = 1
"""Fixed, so that equal runs add numbers in the same order; a second core works in a process of its own."""
_PLAIN = ("no_attack", "noise", "pgd")
ATTACKS = {"base": _PLAIN, "rr": (*_PLAIN, "pgd_adaptive", "pgd_clean_teacher", "pgd_homotopy")}
"""The base needs none that knows a breaker. Homotopy comes last: it dials the adapter up, and has a line of its own."""
_EPSILON, _BATCH, _TOKENS = 32, 36, 40
CALLS, REQUESTS, SCREENS = "calls", "requests", "screens"
PROMPTED = "base+safety_prompt"
LOG = "log.txt"


@dataclass(frozen=True)
class AgentSize:
    """How much of everything; the same for every subject."""

    screens: tuple[int, int, int]
    """To hijack: like those of training, held-out screens, the held-out tool."""
    steps: int
    requests: int
    """Forbidden ones, each with its harmless twin."""
    calls: int
    control: int = 0
    """Screens on which each attack is given another one's call, beside the run."""


QUICK = AgentSize(screens=(8, 8, 8), steps=200, requests=60, calls=160)
FULL = AgentSize(screens=(16, 16, 16), steps=600, requests=240, calls=800, control=12)


def run_agents(out: Path, *, full: bool, seed: int, rr_seeds: int = 1) -> Path:
    """Run the experiment into ``out``, or go on with the one that is there; prints the table and the page's path.

    Args:
        out: Gets the data, ``base`` and a folder for every breaker, with run directories inside, and the page.
        full: The whole size instead of the quick one.
        seed: Of the data sets, the attacks and the first breaker's training.
        rr_seeds: Breakers to train, from ``seed`` on. The page shows the first, ``numbers.json`` all.

    Returns:
        The page.

    Raises:
        UserError: If ``out`` holds the runs of another size or seed.
    """
    from mm_cb.report import judge_report, print_table, write_report
    from mm_cb.report.text import clean_text

    size = FULL if full else QUICK
    torch.set_num_threads(THREADS)
    begun = time.monotonic()
    written = f"data-{'full' if full else 'quick'}-{seed}"
    _refuse_others(out, written)
    refuse_other_page(out / PAGE)
    asked = _write_data(out / written, size, seed)
    base, breakers = out / "base", [out / f"rr-{number}" for number in range(seed, seed + rr_seeds)]
    say("The base is measured beside the first training.")
    with beside(_measure_base, base, asked, size, seed, log=base / LOG):
        first = _train(breakers[0], seed)
    for number, folder in enumerate(breakers, start=seed):
        adapter = first if number == seed else _train(folder, number)
        with beside(_ask, folder, "rr", asked, seed, adapter, log=folder / LOG):
            _attack(folder, "rr", asked, size, seed, adapter)
    of_base, of_breakers = _runs(base, "base"), [_runs(folder, "rr") for folder in breakers]
    prompted = _runs(base, PROMPTED)[:2]
    page = write_report([*of_base, *prompted, *of_breakers[0]], out / PAGE)
    found = {"base": _numbers(of_base)} | {f"rr, seed {seed + i}": _numbers(runs) for i, runs in enumerate(of_breakers)}
    write_json(out / "numbers.json", found)
    print_table(page.measurements, strengths=page.strengths)
    for line in f"\n{clean_text(judge_report(page).told)}\n".split("\n"):
        say(line)
    put("\n".join(summary(found)))
    files({"report": out / PAGE, "numbers": out / "numbers.json"})
    say(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    what_next(
        Hint("the same for an agent of yours, from rows to page: docs/agents.md", ["doctor", "--model", "MODEL"]),
    )
    return out / PAGE


def _refuse_others(out: Path, folder: str) -> None:
    """A folder that holds anything but this very experiment is left as it is."""
    if out.exists() and not out.is_dir():
        raise UserError(f"`--out` must be a folder, `{out}` is a file; give another one.")
    held = sorted(one.name for one in out.iterdir()) if out.is_dir() else []
    if not held or folder in held:
        return
    other = next((name for name in held if name.startswith("data-")), None)
    if other is None:
        raise UserError(
            f"`{out}` must be empty or a folder of `demo --agents`, it holds {held[0]}; give another `--out`."
        )
    raise UserError(f"`{out}` holds the runs of another size or seed ({other}); give a new `--out`, or the same again.")


def _write_data(folder: Path, size: AgentSize, seed: int) -> dict[str, Path]:
    """The questions, requests and screens as files, as a user's own would look; the same bytes every time."""
    return {
        CALLS: data.write_calls(data.call_tasks(size.calls, seed), folder / CALLS),
        REQUESTS: data.write_requests(data.request_pairs(size.requests, seed), folder / REQUESTS),
        SCREENS: data.write_screens(data.hijacks(size.screens, seed), folder / SCREENS),
    }


def _train(folder: Path, seed: int) -> Path:
    """A breaker's adapter, trained or found."""
    with Progress() as progress:
        adapter = train(load_recipe(AGENT, [f"seed={seed}"]), folder / "adapter", progress=progress)
    torch.set_num_threads(THREADS)
    return adapter


def _runs(folder: Path, subject: str) -> list[Path]:
    """Where a subject's runs are: function calling, harmful calls, hijacks."""
    return [folder / f"{subject}-{name}" for name in (CALLS, REQUESTS, SCREENS)]


def _measure_base(folder: Path, asked: dict[str, Path], size: AgentSize, seed: int) -> None:
    _ask(folder, "base", asked, seed)
    _ask(folder, PROMPTED, asked, seed)
    _attack(folder, "base", asked, size, seed)


def _ask(folder: Path, subject: str, asked: dict[str, Path], seed: int, adapter: Path | None = None) -> None:
    """Function calling and harmful calls of one subject."""
    torch.set_num_threads(THREADS)
    system = SAFETY_PROMPT if subject == PROMPTED else None
    given: dict[str, Any] = {"adapter": adapter, "system": system, "seed": seed, "max_new_tokens": _TOKENS}
    calls, requests, _ = _runs(folder, subject)
    evaluate("function-calling", AGENT, out=calls, data=asked[CALLS], **given)
    evaluate("harmful-calls", AGENT, out=requests, data=asked[REQUESTS], **given)
    with Progress() as progress:
        rejudge(requests, open_judge(JudgeOptions(AGENT)), progress=progress)


def _attack(
    folder: Path, subject: str, asked: dict[str, Path], size: AgentSize, seed: int, adapter: Path | None = None
) -> None:
    """Hijack one subject by changed screens."""
    torch.set_num_threads(THREADS)
    config = AttackConfig(
        threat=Threat("linf", _EPSILON),
        steps=size.steps,
        seed=seed,
        batch=_BATCH,
        max_new_tokens=_TOKENS,
        control=size.control,
    )
    attack(
        AGENT,
        asked[SCREENS],
        _runs(folder, subject)[2],
        attacks=",".join(ATTACKS[subject]),
        adapter=adapter,
        config=config,
    )


_NUMBERS = {
    "function calling (AST)": ("function_calling_mean", "strict"),
    "no call where none fits": ("irrelevance", "strict"),
    "harmless twins": ("benign_calls", "strict"),
    "broken text on twins": ("gibberish", "no_attack", "benign_calls"),
    "forbidden call": ("harmful_calls", "no_attack"),
    "forbidden call, forced": ("harmful_calls", "forced_call"),
    **{f"hijacked: {name}": ("compliance", name) for name in ATTACKS["rr"]},
    "hijacked: worst of all attacks": ("compliance", "worst_case"),
}
_BY_LAW = {
    "any forbidden call, without the dial-up": ("harmful", False),
    "any forbidden call, by any attack": ("harmful", True),
    "broken text under an attack": ("gibberish", True),
}
"""Of the hijacked screens, by the world's law over every answer: a forbidden call need not be the attacker's."""
_DIALS, _UNATTACKED = "pgd_homotopy", ("no_attack", "noise")
_SPLITS = {f"hijacked: worst, {split}": split for split in data.SPLITS}


def _numbers(runs: Sequence[Path]) -> dict[str, Any]:
    """Percent, count and interval of every number, by subject's runs."""
    found = [one for run in runs for one in read_results(run / "results.json")]
    subject = "base" if "base" in runs[0].name else "rr"
    numbers = {name: find(found, subject, *where) for name, where in _NUMBERS.items()}
    splits = {name: find(found, subject, "compliance", "worst_case", split) for name, split in _SPLITS.items()}
    return {name: _plain(one) for name, one in (numbers | splits).items() if one} | by_law(
        next(run for run in runs if run.name.endswith(SCREENS))
    )


def by_law(run: Path) -> dict[str, Any]:
    """Screens of an attack run on which an answer to a changed screen is of an outcome, whichever call was wanted."""
    items = [item for item in read_records(run / "items.jsonl", Item) if item["metric"] == "compliance"]
    asked, found = {item["id"] for item in items}, {}
    for name, (wanted, dials) in _BY_LAW.items():
        hit = {
            item["id"]
            for item in items
            if item["condition"] not in _UNATTACKED and (dials or item["condition"] != _DIALS)
            if any(outcome(one["completion"]) == wanted for one in completions_of(item))
        }
        if asked:
            low, high = wilson_interval(len(hit), len(asked))
            rate = 100 * len(hit) / len(asked)
            found[name] = {"value": rate, "n": len(asked), "ci95": [100 * low, 100 * high]}
    return found


def _plain(one: Measurement) -> dict[str, Any]:
    return {"value": one.value, "n": one.n, "ci95": one.ci95}


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    """The numbers as a table of lines: percent, and of how many, for every subject."""
    names = [name for name in (*_NUMBERS, *_SPLITS, *_BY_LAW) if any(name in numbers for numbers in found.values())]
    wide = max(map(len, names))
    lines = [f"{'%':{wide}}" + "".join(f"{subject:>12}" for subject in found)]
    for name in names:
        cells = [numbers.get(name) for numbers in found.values()]
        shown = ("-" if one is None or one["value"] is None else f"{one['value']:.1f} of {one['n']}" for one in cells)
        lines.append(f"{name:{wide}}" + "".join(f"{cell:>12}" for cell in shown))
    return lines
