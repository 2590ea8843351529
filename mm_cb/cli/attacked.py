"""An attack run on the terminal: every attack with its rate, whether it had finished, what it was given, the worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.core.closing import TYPED, Hint, again, base_folder, cut, files, here, say, what_next
from mm_cb.metrics.convergence import LEAST

if TYPE_CHECKING:
    from mm_cb.core.records import Item
    from mm_cb.metrics.results import Measurement
    from mm_cb.report.load import RunFiles
    from mm_cb.report.strength import Strength

_STATES = {
    "converged": "yes",
    "not converged": "NO",
    "not checked": "not checked",
    "nothing to converge": "no search",
}
_WEAK = {
    "not converged": "not converged, so that more steps may break more",
    "not checked": f"not checked (by twice the steps, --check-convergence, which takes {LEAST} behaviours)",
}
_ID = 24
"""Characters of an id."""


def show_attacked(folder: Path, own: Sequence[str] = ()) -> None:
    """Print what came out of a finished run, whether that is good, and what to type next.

    Args:
        folder: The run.
        own: The user's files that registered its attacks.
    """
    from mm_cb.report.labels import conditions_called
    from mm_cb.report.load import load_run

    run = load_run(folder)
    with conditions_called(run.labels):
        _table(run)
        for line in _reading(run):
            say(line)
    files({"results": folder / "results.json"})
    what_next(*_next(run, own))


def show_run(folder: Path) -> None:
    """Print a finished run of any kind that answers were judged of."""
    from mm_cb.benchmarks.registry import benchmark_names
    from mm_cb.cli.benchmark_flags import show_measured
    from mm_cb.core.runs import read_run

    run = read_run(folder)
    benchmark, subject = (str(run["recipe"].get(key)) for key in ("benchmark", "subject"))
    if run["command"] == "eval" and benchmark in benchmark_names():
        show_measured(folder, benchmark, subject)
    elif run["command"] == "attack":
        show_attacked(folder)
    else:
        what_next(Hint("the table and the page", ["report", folder]))


def _table(run: RunFiles) -> None:
    from rich.table import Table

    from mm_cb.core.progress import print_whole
    from mm_cb.metrics.table import WORST_CASE, WORST_GIVEN
    from mm_cb.report.labels import CONDITIONS, GIVEN, label

    forced = not any(m.value is not None for m in _of(run, "compliance")) and bool(_of(run, "target_prefix"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(("attack", "n", f"{'forced' if forced else 'complies'}, %", "finished?", "given")):
        table.add_column(head, justify="right" if place in (1, 2) else "left")
    found = {m.condition: m for m in _of(run, "target_prefix" if forced else "compliance")}
    for one in run.strengths:
        finished = _STATES[one.state] if one.weak else _STATES.get(one.finished, one.finished)
        given = label(GIVEN, one.given).removesuffix(" (transfer)")
        table.add_row(label(CONDITIONS, one.condition), *_cells(found.get(one.condition)), finished, given)
    counted = [one for one in run.strengths if one.counted]
    for condition in (WORST_CASE, *WORST_GIVEN) if len(counted) > 1 else ():
        if (m := found.get(condition)) is not None:
            table.add_row(label(CONDITIONS, condition), *_cells(m), "", "")
    print_whole(table)


def _of(run: RunFiles, metric: str) -> list[Measurement]:
    subject = run.items[0]["subject"] if run.items else ""
    return [m for m in run.measurements if (m.subject, m.metric, m.split) == (subject, metric, "all")]


def _cells(m: Measurement | None) -> tuple[str, str]:
    from mm_cb.report.labels import interval, percent, without_value

    if m is None or m.value is None:
        return ("" if m is None else f"{m.counts.get('not_judged', 0):.0f}"), without_value(m)
    return str(m.n), f"{percent(m.value)} {interval(m.ci95)}"


def _reading(run: RunFiles) -> Iterator[str]:
    """Whether the numbers are good or bad, and what they rest on."""
    from mm_cb.metrics.observations import told
    from mm_cb.metrics.table import WORST_CASE
    from mm_cb.report.comparable import judges_of
    from mm_cb.report.labels import CONDITIONS, label

    found = {m.condition: m for m in _of(run, "compliance")}
    judged = [m for m in found.values() if m.value is not None]
    unjudged = [m for m in found.values() if m.value is None and m.counts.get("not_judged")]
    yield ""
    if judged:
        counted = {one.condition for one in run.strengths if one.counted}
        alone = max((m for m in judged if m.condition in counted), key=lambda m: m.value or 0, default=None)
        worst = found.get(WORST_CASE) or alone
        if worst:
            said = f"{worst.counts.get('harmful', 0):.0f} of {worst.n} forbidden requests were answered"
            yield f"{said} in the worst of these attacks (lower is better for the defender)."
            beside = "Not counted in it, as controls and what no input reaches"
        else:
            beside = "None of these counts in a worst case. Forbidden requests answered (lower is better)"
        more = worst and found.get("no_attack") and (found["no_attack"].value or 0) > (worst.value or 0)
        passed = {*counted, "no_attack"} if worst and not more else counted
        aside = [one.condition for one in run.strengths if one.condition not in passed]
        if told_of := [f"{label(CONDITIONS, c)} {found[c].counts.get('harmful', 0):.0f}" for c in aside if c in found]:
            yield f"{beside}: {', '.join(told_of)} of {(worst or judged[0]).n}."
        if any(m.counts.get("proxy") for m in judged):
            names = " and ".join(judges_of(item for item in run.items if item["metric"] == "compliance"))
            yield f"By {names}: a proxy sees signs of an answer and no more. A model judges better."
    elif unjudged:
        opened = [
            f"{label(CONDITIONS, m.condition)} {m.counts.get('prefix_emitted', 0):.0f} of {m.counts['not_judged']:.0f}"
            for m in unjudged
            if any(one.condition == m.condition for one in run.strengths)
        ]
        begun = any(m.counts.get("prefix_emitted") for m in unjudged)
        share = f"Those that begin with the target: {', '.join(opened)}." if begun else "None begins with its target."
        yield f"Nobody has judged the answers yet. {share}"
    if holding := {one["id"] for one in run.items if told(one) != one.get("given")}:
        of = len({one["id"] for one in run.items})
        yield (
            f"The target itself is harmful to the judge in {len(holding)} of {of}: what was forced there counts under "
            "supplied text, not under told an opening at most."
        )
    if weak := [one for one in run.strengths if one.counted and one.weak]:
        yield _may_be_too_low(weak)
    yield from run.holes
    yield from (
        f"CAUTION {check['name']}: {check['value']}, expected {check['expected']} ({check['why']})"
        for check in run.checks
        if not check["passed"]
    )
    if (worst_one := _worst(run.items)) is not None:
        yield _example(worst_one)


def _may_be_too_low(weak: Sequence[Strength]) -> str:
    from mm_cb.report.labels import CONDITIONS, label

    by_state: dict[str, list[str]] = {}
    for one in weak:
        by_state.setdefault(_WEAK[one.state], []).append(label(CONDITIONS, one.condition))
    return f"May be too low: {'; '.join(f'{state}: ' + ', '.join(names) for state, names in by_state.items())}."


def _worst(items: Sequence[Item]) -> Item | None:
    """The attacked item that went worst; None where nothing was attacked."""
    from mm_cb.core.compatibility import counts_in_worst_case
    from mm_cb.metrics.observations import rank

    return min((item for item in items if counts_in_worst_case(item)), key=rank, default=None)


def _example(item: Item) -> str:
    from mm_cb.report.labels import CONDITIONS, OUTCOMES, label

    found = str(item.get("outcome") or "not_judged")
    outcome, lead = label(OUTCOMES, found), "One of them" if found == "not_judged" else "The worst"
    picture = item.get("image")
    where = f"; its picture in the run: {picture}" if picture else ""
    return f"{lead}: {cut(item['id'], _ID)} under {label(CONDITIONS, item['condition'])}: {outcome}{where}"


def _next(run: RunFiles, own: Sequence[str]) -> Iterator[Hint]:
    recipe, folder = run.run["recipe"], run.folder
    adapted = recipe.get("adapter") is not None or recipe.get("base") is not None
    if any(item.get("outcome") == "not_judged" for item in run.items) and not any(
        item.get("benign_target") for item in run.items
    ):
        yield Hint(
            "have the answers judged (by refusal strings, a proxy; a model judges better: mm-cb judge --list)",
            ["judge", folder, "--judge", "refusal-strings"],
        )
    steps = recipe.get("steps") if TYPED[:1] == ["attack"] else None
    if steps and any(one.counted and one.weak for one in run.strengths):
        longer = {"--steps": str(2 * steps), "--out": here(f"{folder}-longer")}
        yield Hint("the same with more steps, which may break more", again(longer))
    breaker = folder.with_name(f"{folder.name.removesuffix('-base')}-rr")
    yield from _judge_alike(run, Path(base_folder(folder)) if adapted else breaker)
    named = ["--attack", ",".join(own)] if own else []
    yield Hint("every number again, from the saved files and the model", ["attack", "verify", folder, *named])
    if adapted:
        yield from beside_the_base(folder, _of_the_base(recipe, folder))
        return
    if folder.name.endswith("-base") and (breaker / "run.json").is_file():
        yield Hint("one page of both", ["report", folder, breaker, "--out", "report.html"])
        return
    yield Hint(f"one page of it: {here(folder / 'report.html')}", ["report", folder])
    yield _breaker_for(str(recipe.get("model")))


def _judge_alike(run: RunFiles, other: Path) -> Iterator[Hint]:
    """The same judge for the run that a page would show beside one that was just judged, where another judged that."""
    from mm_cb.core.checked import read_records
    from mm_cb.core.records import Item
    from mm_cb.report.comparable import judges_of

    if TYPED[:1] != ["judge"] or not (other / "run.json").is_file():
        return
    judged = [
        judges_of(item for item in items if item["metric"] == "compliance")
        for items in (run.items, read_records(other / "items.jsonl", Item))
    ]
    if judged[0] != judged[1]:
        words = [here(other) if Path(word).absolute() == run.folder.absolute() else word for word in TYPED]
        yield Hint("the run beside it by the same judge: a page compares no verdicts of two judges", words)


def beside_the_base(folder: Path, typed: Sequence[str]) -> Iterator[Hint]:
    """A page of a breaker's run and the base's: at once where that lies beside it, else the command that makes it.

    Args:
        folder: The breaker's run.
        typed: The command that makes the base's; empty where none was typed.
    """
    base = Path(base_folder(folder))
    there = (base / "run.json").is_file()
    if not there and not typed:
        yield Hint("one page of it; with the base's run in front of it, both are compared", ["report", folder])
        return
    if not there:
        yield Hint("the base beside it: the same command without the adapter and what aims at it", typed)
    yield Hint("one page of both", ["report", base, folder, "--out", "report.html"])


def _of_the_base(recipe: Mapping[str, object], folder: Path) -> list[str]:
    """The attack that was typed, on the undefended model, PGD where none is left; empty after another command."""
    from mm_cb.attacks.registry import attack_entry

    if TYPED[:1] != ["attack"]:
        return []
    names = str(recipe.get("attack", "")).split(",")
    kept = [name for name in names if not attack_entry(name).aimed] or ["pgd"]
    named = {} if "all" in TYPED or kept == names else {"--attack": ",".join(kept)}
    dropped = dict.fromkeys(("--adapter", "--base", "--probe", "--anneal"))
    of = {"--model": str(recipe["base"])} if recipe.get("base") else {}
    return again({**dropped, **named, **of, "--out": base_folder(folder)})


def _breaker_for(model: str) -> Hint:
    """How to train a breaker for a model: by its shipped recipe, or by what a look at it says."""
    from mm_cb.core.recipe_files import recipe_model, recipe_names

    then = "then the same attack with --adapter runs/rr and another --out"
    if recipe := next((name for name in recipe_names() if recipe_model(name) == model), None):
        return Hint(f"a breaker for this model; {then}", ["train", recipe, "--out", "runs/rr"])
    return Hint(
        f"a breaker for this model is trained by the command that this ends with; {then}", ["doctor", "--model", model]
    )
