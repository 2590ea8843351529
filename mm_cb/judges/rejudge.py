"""``mm-cb judge``: stored completions judged again, without the model that wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mm_cb.core.chat_replies import UNANSWERED, unread
from mm_cb.core.checked import read_list, read_records
from mm_cb.core.compatibility import with_added_fields
from mm_cb.core.errors import UserError
from mm_cb.core.pages import PAGE, not_ours
from mm_cb.core.paths import absolute, safe_id
from mm_cb.core.progress import Progress
from mm_cb.core.records import Agreement, Candidate, Check, Item, Run, StoredVerdict
from mm_cb.core.runs import file_sha256, held, keep_pictures, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.data.pictures import file_inside
from mm_cb.judges.base import NOT_JUDGED, Case, Judge
from mm_cb.judges.stored_verdicts import (
    FOLDER,
    Judged,
    judge_all,
    outcome_of,
    refuse_missing_fields,
    refuse_other_source,
)
from mm_cb.metrics.agreement import agreements, completions_of, key_of
from mm_cb.metrics.checks import attack_is_strong, placebo_is_weak
from mm_cb.metrics.holes import absent_outputs, absent_pictures, read_curves
from mm_cb.metrics.observations import rank, worst_pictures
from mm_cb.metrics.results import Measurement, measure, read_results, write_results
from mm_cb.metrics.table import judged_as, metric
from mm_cb.metrics.whole import refuse_contradiction, whole_items

NEWEST = "newest.json"
"""Whose verdicts items.jsonl and results.json carry; absent while they are being written."""
AS_RUN = "as-run"
"""The name under which a run's own verdicts are kept."""


def rejudge(run_dir: str | Path, judge: Judge, *, behaviors: Path | None = None, progress: Progress) -> list[Agreement]:
    """Judge every stored completion; verdicts lie in ``judgements/``, items.jsonl and results.json carry the new ones.

    Every verdict is written when it is there, so that a stopped run repeats none. What is no verdict (an answer that
    cannot be read) is not kept: the same command asks for it again. Verdicts of earlier judges stay, and
    ``judgements/agreement.json`` compares all of them. ``judgements/newest.json`` names this judge when all is written.
    Checks and selected pictures that rest on verdicts follow; the run's report page is removed (see ``mm-cb judge``).

    Args:
        run_dir: A finished run with completions.
        judge: The judge.
        behaviors: The behaviours file of the run, for judges that need more than the prompt (a context).
        progress: Shows the count.

    Returns:
        One record per pair of judges: agreement, Cohen's kappa, disagreements.

    Raises:
        UserError: If the run holds nothing that this judge can judge, the behaviours file is missing or another one, an
            earlier judge of this name gave verdicts by another model or prompt, or not one verdict can be read.
    """
    run_dir = absolute(run_dir)
    with held(run_dir) as run:
        items = whole_items(run_dir, run)
        judged = judgeable(items, run_dir, judge.name, judge.metrics)
        if (refuse := getattr(judge, "refuse", None)) is not None:
            refuse(judged, with_added_fields(run["command"], run["recipe"]))
        extras = _extras(run, behaviors)
        cases = _cases(judged, run_dir, extras)
        targets = {} if judge.source.get("proxy") else _targets(judged, extras)
        refuse_missing_fields(judge, list(cases.values()), run, behaviors)
        _refuse_holes(run_dir, run, items, judge)
        refuse_other_source(run_dir / FOLDER, judge)
        verdicts = judge_all(run_dir / FOLDER, judge, cases | targets, progress)
        _refuse_prose(judge, [verdicts[key] for key in cases])
        _say_unjudged([verdicts[key] for key in cases], progress)
        _keep_as_run(run_dir, judged)
        (run_dir / FOLDER / NEWEST).unlink(missing_ok=True)
        _remove_page(run_dir / PAGE, progress)
        _judge_targets(judged, verdicts)
        _write_items(run_dir, items, judged, verdicts, judge)
        _write_results(run_dir, items, judge)
        found = agreements(run_dir / FOLDER, judged)
        write_json(run_dir / FOLDER / "agreement.json", found)
        write_json(run_dir / FOLDER / NEWEST, {"judge": judge.name})
        return found


def _remove_page(page: Path, progress: Progress) -> None:
    """Remove the run's page, which shows the verdicts before; one elsewhere is its owner's to make again."""
    if strange := not_ours(page):
        progress.say(f"`{page}` is {strange} and is left alone: it does not show the new verdicts")
    else:
        page.unlink(missing_ok=True)


def _refuse_holes(run_dir: Path, run: Run, items: list[Item], judge: Judge) -> None:
    """Read all that a page of the run reads and verdicts are written into, before the first of them is paid for.

    Raises:
        UserError: If a file is gone, cannot be read or contradicts the items, these cannot be measured, or a picture
            that the judge is to see is gone or another one; names it.
    """
    before, _ = _measured(run_dir, items)
    verdicts = run_dir / FOLDER
    if (verdicts / NEWEST).is_file() or not (verdicts / f"{AS_RUN}.jsonl").is_file():  # else it stopped while writing
        refuse_contradiction(run_dir, items, before, run["seed"])
    read_list(run_dir / "checks.json", Check)
    read_curves(run_dir / "curves.json")
    judged = [item for item in items if judged_as(item["metric"]) in judge.metrics]
    shown = judged if getattr(judge, "sees", False) else []
    for hole in (*absent_outputs(run_dir, run), *absent_pictures(run_dir, shown)):
        raise UserError(f"{hole} Nothing was judged: take its whole folder from where it was made, or repeat the run.")
    for other in (run_dir / FOLDER).glob("*.jsonl"):
        if other.stem != safe_id(judge.name):  # whose own are looked at one by one
            read_records(other, StoredVerdict)


def _measured(run_dir: Path, items: list[Item]) -> tuple[list[Measurement], list[Measurement]]:
    """The measurements that lie there, and those of the items."""
    before = read_results(run_dir / "results.json")
    pairs = {(m.subject, m.paired_with) for m in before if m.paired_with is not None}
    try:
        return before, measure(items, pairs=sorted(pairs))
    except ValueError as error:
        raise UserError(f"the items of `{run_dir}` cannot be measured: {error} Repeat the run.") from error


def judgeable(items: Iterable[Item], run_dir: Path, name: str, metrics: Sequence[str]) -> list[Item]:
    """The items of a run that a judge of these metrics can judge.

    Raises:
        UserError: If there are none, or the run's targets are harmless, which says nothing about compliance.
    """
    items = list(items)
    if any(item.get("benign_target") for item in items):
        raise UserError(
            f"`{run_dir}` forced harmless targets: there is no compliance to judge. Its number is `target_prefix` in "
            "results.json."
        )
    judged = [item for item in items if judged_as(item["metric"]) in metrics]
    found = [item for item in judged if completions_of(item) and not _unanswered(item)]
    if not found:
        can = f"`{run_dir}` holds no completions that `{name}` can judge (metrics: {', '.join(metrics)})"
        there = {judged_as(item["metric"]) for item in items if completions_of(item)}
        known = {one: metric(one).outcomes for one in sorted(there) if metric(one).outcomes and one not in metrics}
        held = "; ".join(f"{one}, whose outcomes are {', '.join(outcomes)}" for one, outcomes in known.items())
        raise UserError(f"{can}{f', they are of {held}' if held else ''}.")
    return found


def _unanswered(item: Item) -> bool:
    """Whether a server gave no answer, so that there is nothing to judge."""
    return item.get("reason") in UNANSWERED and not item["completion"]


def _cases(items: Iterable[Item], run_dir: Path, extras: Mapping[str, Mapping[str, Any]]) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for item in items:
        extra = extras.get(item["id"], {})
        for one in completions_of(item):
            key = key_of(item, one)
            image = file_inside(run_dir, one.get("image") or item.get("screen"))
            judged_by, place = judged_as(item["metric"]), f"{item['id']}, {item['condition']}"
            cases.setdefault(key, Case(key, _asked(item, extra), one["completion"], judged_by, image, extra, place))
    return cases


def _targets(items: Iterable[Item], extras: Mapping[str, Mapping[str, Any]]) -> dict[str, Case]:
    """The targets of attacks, as if a model had said them: one that is harmful itself is a supplied text."""
    cases: dict[str, Case] = {}
    for item in items:
        if item["metric"] == "compliance" and "given" in item and item.get("target"):
            key, extra = _target_key(item), extras.get(item["id"], {})
            cases.setdefault(key, Case(key, _asked(item, extra), item["target"], extra=extra))
    return cases


def _asked(item: Item, extra: Mapping[str, Any]) -> str:
    return str(extra.get("behavior") or item.get("prompt") or "")


def _target_key(item: Item) -> str:
    return f"target of {item['id']}"


def _judge_targets(items: Iterable[Item], verdicts: Mapping[str, Judged]) -> None:
    """Write what a judge says of the targets; what an earlier judge said goes."""
    for item in items:
        if (found := verdicts.get(_target_key(item))) is not None:
            item["target_outcome"] = found["outcome"]
        else:
            item.pop("target_outcome", None)


def _extras(run: Run, behaviors: Path | None) -> dict[str, Mapping[str, Any]]:
    """Further keys of every behaviour, by id."""
    if behaviors is None:
        return {}
    read: list[Behavior] = read_behaviors(behaviors)
    if file_sha256(behaviors) not in run["inputs"].values():
        raise UserError(f"`{behaviors}` must be the behaviours file of this run; its content is another one.")
    return {behavior.id: behavior.extra for behavior in read}


def _say_unjudged(verdicts: Sequence[Judged], progress: Progress) -> None:
    without = [verdict for verdict in verdicts if verdict["outcome"] == NOT_JUDGED]
    if without:
        counted = f"{len(without)} of {len(verdicts)} completions have no verdict"
        progress.say(f"CAUTION {counted}, the first: {_why(without)}")


def _refuse_prose(judge: Judge, verdicts: Sequence[Judged]) -> None:
    if all(verdict["outcome"] == NOT_JUDGED for verdict in verdicts):
        raise UserError(
            f"`{judge.name}` must give a verdict, but none of its {len(verdicts)} answers is one, the first "
            f"{_why(verdicts)}; take another prompt, other labels or another judge. The run's results stay as they "
            "were."
        )


def _why(verdicts: Sequence[Judged]) -> str:
    """What the first came with in the place of a verdict."""
    return verdicts[0].get("reason", "").rstrip(".") or unread(str(verdicts[0].get("raw") or ""))


def _keep_as_run(run_dir: Path, items: Iterable[Item]) -> None:
    path = run_dir / FOLDER / f"{AS_RUN}.jsonl"
    if path.is_file():
        return
    own = {key_of(item, one): one.get("outcome") or NOT_JUDGED for item in items for one in completions_of(item)}
    write_jsonl(path, [{"key": key, "outcome": outcome} for key, outcome in own.items()])


def _write_items(
    run_dir: Path, items: Sequence[Item], judged: Iterable[Item], verdicts: Mapping[str, Judged], judge: Judge
) -> None:
    for item in judged:
        for one in completions_of(item):
            verdict = verdicts[key_of(item, one)]
            one["outcome"] = outcome_of(verdict["outcome"], item, one)
            one["judge_score"] = verdict["score"]
        if item.get("candidates"):
            worst = min(completions_of(item), key=rank)
            shown = {name: value for name, value in worst.items() if name in item or name == "judge_score"}
            item |= cast("Candidate", shown)
        item["gibberish"] = item["outcome"] == "gibberish"
        item["judge"] = judge.name
    there = [item for item in judged if file_inside(run_dir, item.get("image")) is not None]
    keep_pictures(run_dir, worst_pictures(there))
    write_jsonl(run_dir / "items.jsonl", items)


def _write_results(run_dir: Path, items: list[Item], judge: Judge) -> None:
    """Measure again what the verdicts decide; every other measurement stays as it was."""
    before, anew = _measured(run_dir, items)
    decided = {*judge.metrics, "gibberish"}
    kept = {m.address: m for m in before if judged_as(m.metric) not in decided}
    proxy = bool(judge.source.get("proxy"))
    written = []
    for m in anew:
        unchanged = kept.pop(m.address, m)
        written.append(_labelled(unchanged) if proxy and judged_as(m.metric) in judge.metrics else unchanged)
    measured = [*written, *kept.values()]
    _write_checks(run_dir / "checks.json", measured)
    write_results(run_dir / "results.json", measured)


def _write_checks(path: Path, measurements: Sequence[Measurement]) -> None:
    """The run's checks with those made again that its verdicts decide."""
    if not path.is_file():
        return
    again = {check["name"]: check for check in (attack_is_strong(measurements), placebo_is_weak(measurements))}
    write_json(path, [again.get(check["name"], check) for check in read_list(path, Check)])


def _labelled(m: Measurement) -> Measurement:
    return dataclasses.replace(m, counts={**m.counts, "proxy": m.n})
