"""Verdicts on disk: written one by one, read back by the next start, and only where a judge could have given them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

from mm_cb.core.chat_replies import UNANSWERED
from mm_cb.core.checked import read_records
from mm_cb.core.endpoint import EndpointError, UnfitModelError
from mm_cb.core.errors import UserError
from mm_cb.core.files import jsonl_lines
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress
from mm_cb.core.reading import decode, file_bytes, is_there, loads, shown
from mm_cb.core.records import Candidate, Item, Run
from mm_cb.core.runs import append_jsonl, read_jsonl, write_json, write_jsonl
from mm_cb.core.thoughts import served_as
from mm_cb.judges.base import NOT_JUDGED, Case, Judge, Verdict
from mm_cb.metrics.agreement import completions_of, key_of
from mm_cb.metrics.table import metric

FOLDER = "judgements"
"""Of a run: one file of verdicts a judge."""
FROM_THE_START = "judge.json"
"""Of a run: the proxy that judged it as it was made, see `note_source`."""


class Judged(TypedDict, total=False):
    """One line of judgements/<judge>.jsonl: a `Verdict`, or what an earlier version kept as one, see `judge_all`."""

    key: Required[str]
    """Of the completion."""
    outcome: Required[Any]
    score: Required[Any]
    raw: str
    served: str
    """The model that the judge's server names, where it is another name than was asked for."""
    address: str
    """Where the judge's server was."""
    reason: str
    """Why there is no verdict, which is not kept."""


def refuse_missing_fields(judge: Judge, cases: Sequence[Case], run: Run, behaviors: Path | None) -> None:
    """Refuse a judge that would read fields of the behaviours file, where no case has them.

    Raises:
        UserError: In that case; names the file.
    """
    for field in getattr(judge, "fields", ()):
        asked = [case for case in cases if case.metric == "compliance"]
        if not asked or any(case.extra.get(field) for case in asked):
            continue
        if behaviors is None:
            named = [name for name in run["inputs"] if name.endswith((".jsonl", ".json"))]
            which = f" (`{named[0]}` when the run was made)" if len(named) == 1 else ""
            raise UserError(
                f"judge `{judge.name}` reads `{field}` of every behaviour: give the run's behaviours file{which} with "
                "`--behaviors FILE`."
            )
        raise UserError(
            f"judge `{judge.name}` reads `{field}` of every behaviour, no row of `{behaviors}` that was asked has it; "
            "take another judge."
        )


def refuse_other_source(folder: Path, judge: Judge) -> None:
    """Note what decides a judge's verdicts; other verdicts under its name must go first.

    Raises:
        UserError: If there are some.
    """
    path = folder / f"{safe_id(judge.name)}.json"
    source = json.loads(json.dumps({"judge": judge.name, "source": dict(judge.source)}, default=str))
    if is_there(path) and _source_in(path) != source and _verdicts_in(path.with_suffix(".jsonl")):
        raise UserError(
            f"`{path}` says that `{judge.name}` judged here with another model, prompt or labels, or by another "
            "version of a file of yours; delete it and its .jsonl to judge anew."
        )
    write_json(path, source)


def note_source(run_dir: Path, judge: Judge) -> None:
    """Note what decides the verdicts of a judge that a run has from the start, and keeps in its items alone."""
    write_json(run_dir / FROM_THE_START, {"judge": judge.name, "source": dict(judge.source)})


def source_of(run_dir: Path, name: str) -> Mapping[str, Any] | None:
    """What decided the verdicts that a judge left in a run, empty where that is lost; None where it left none there."""
    path = run_dir / FOLDER / f"{safe_id(name)}.json"
    if not is_there(path):
        if path.with_suffix(".jsonl").is_file():
            return {}
        path = run_dir / FROM_THE_START
        if not is_there(path):
            return None
    content = _source_in(path)
    if path.name == FROM_THE_START and not (isinstance(content, dict) and content.get("judge") == name):
        return None
    source = content.get("source") if isinstance(content, dict) else None
    return source if isinstance(source, dict) else {}


def _source_in(path: Path) -> Any:
    try:
        return loads(decode(file_bytes(path)), any_text=True)
    except ValueError:
        return None  # damaged: nobody knows which judge the verdicts are from


def _verdicts_in(path: Path) -> dict[str, Judged]:
    """The verdicts of a store, without what earlier versions kept there although it is none."""
    try:
        return {one["key"]: one for one in read_records(path, Judged) if one["outcome"] != NOT_JUDGED}
    except UserError as error:
        raise UserError(f"{error} Delete the file to judge anew.") from error


def served_names(run_dir: Path, name: str) -> str:
    """What the server of a run's judge calls the models that answered, with how many verdicts; empty if as asked."""
    verdicts = _verdicts_in(run_dir / FOLDER / f"{safe_id(name)}.jsonl").values()
    return named_by_server([one.get("served") for one in verdicts], "verdicts")


def named_by_server(names: Sequence[str | None], what: str) -> str:
    """The models that a server named instead of what was asked for, with how often; empty if there are none."""
    told = [f"{name} ({count})" for name, count in Counter(names).most_common() if name]
    return f", by its server's replies {' and '.join(told)} of {len(names)} {what}" if told else ""


def outcome_of(outcome: str, item: Item, one: Candidate) -> str | None:
    """A verdict as the item's metric knows it; an answer that was found incoherent when it was made is no answer."""
    if one.get("incoherent") and outcome in ("other", "compliance"):
        return "gibberish"
    return None if outcome == NOT_JUDGED and item["metric"] != "compliance" else outcome


def refuse_other_verdicts(run_dir: Path, items: Sequence[Item]) -> None:
    """Refuse items that do not carry what the judge that they name has said, where its verdicts are kept.

    Args:
        run_dir: A run.
        items: Its records.

    Raises:
        UserError: Naming the first such item.
    """
    said: dict[str, dict[str, Judged]] = {}
    for item in items:
        name = item.get("judge")
        if not name or not (path := run_dir / FOLDER / f"{safe_id(name)}.jsonl").is_file():
            continue
        verdicts = said.setdefault(name, _verdicts_in(path) if name not in said else {})
        for one in completions_of(item):
            verdict = verdicts.get(key_of(item, one))
            found = outcome_of(verdict["outcome"] if verdict else NOT_JUDGED, item, one)
            if one.get("outcome") != found and not (verdict is None and item.get("reason") in UNANSWERED):
                raise UserError(
                    f"`{run_dir / 'items.jsonl'}`: an answer of `{item['id']}` under {item['condition']} is "
                    f"{shown(one.get('outcome'))}, `{path}` says {shown(found)}: give `mm-cb judge` again, or take the "
                    "whole folder from where it was made."
                )


def _wrong_with(outcome: Any, score: Any, metric_name: str) -> str | None:
    """What no judge can say of a completion of this metric."""
    known = metric(metric_name).outcomes
    if not isinstance(outcome, str) or (known and outcome not in (*known, NOT_JUDGED)):
        return f"one of {', '.join(dict.fromkeys([*known, NOT_JUDGED]))}, got {outcome!r}"
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (number and 0 <= score <= 1):
        return f"a score in 0..1 or None, got {score!r}"
    return None


def _refuse_contradictions(path: Path, judge: Judge, cases: Mapping[str, Case]) -> None:
    """Refuse a stored verdict that its judge's own words, read again, contradict.

    Whether a text is broken, which versions see differently, is left alone.

    Raises:
        UserError: Naming file and line.
    """
    read_again: Callable[[Case, str], Verdict] | None = getattr(judge, "reads", None)
    if read_again is None or not path.is_file():
        return
    for number, line in jsonl_lines(path):
        case, raw = cases.get(str(line.get("key"))), line.get("raw")
        if case is None or not isinstance(raw, str) or line.get("outcome") == NOT_JUDGED:
            continue
        again = read_again(case, raw)
        said = (again.outcome, line.get("outcome"))
        same = said[0] == said[1] or "gibberish" in said
        if not same or (again.score is None) is not (line.get("score") is None):
            raise UserError(
                f"{path}:{number} says {shown(line.get('outcome'))}, score {shown(line.get('score'))} (item "
                f"`{case.item}`), but the judge's own words {shown(raw)} mean {shown(again.outcome)}; one of them was "
                "changed: delete the line to have it judged anew."
            )


def said_of(judge: Judge, cases: Sequence[Case]) -> Iterator[tuple[str, Verdict]]:
    """What a judge says of cases, each verdict as it comes, if it is one.

    Raises:
        UserError: If it says something else, of something else, or twice; names the judge and the case.
    """
    if not cases:
        return
    waiting = {case.key: case for case in cases}
    said = judge.judge(cases)
    if not isinstance(said, Iterable) or isinstance(said, str | Mapping):
        raise UserError(
            f"judge `{judge.name}` must yield a case's `key` and a `Verdict`, case by case, its `judge` returns "
            f"{shown(said)}."
        )
    for one in said:
        left = f"(the first item that waits is {shown(next((case.item for case in waiting.values()), 'none'))})"
        if not isinstance(one, tuple | list) or len(one) != 2 or not isinstance(one[1], Verdict):
            raise UserError(f"judge `{judge.name}` must yield a case's `key` and a `Verdict`, got {shown(one)} {left}.")
        key, verdict = one
        if not isinstance(key, str) or key not in waiting:
            raise UserError(
                f"judge `{judge.name}` must yield the `key` of a case that it was given, each once, got {shown(key)} "
                f"{left}."
            )
        case = waiting.pop(key)
        wrong = _wrong_with(verdict.outcome, verdict.score, case.metric)
        if wrong or not (isinstance(verdict.raw, str) and isinstance(verdict.reason, str)):
            wrong = wrong or f"what is a text as `raw` and `reason`, got {shown(verdict.raw)}, {shown(verdict.reason)}"
            raise UserError(f"judge `{judge.name}` must say of `{case.metric}` {wrong} (item `{case.item}`).")
        yield key, verdict


def _reused(path: Path, judge: Judge, kept: Sequence[Judged], of: int) -> str:
    """How many verdicts are not asked for again, and from where they are; empty where all are."""
    where = " and ".join(dict.fromkeys(str(one["address"]) for one in kept if "address" in one))
    at = f" at {where}" if where else ""
    told = f"{len(kept)} of {of} verdicts are from before, by `{judge.name}`{at}: delete `{path}` to have all anew"
    return told if kept else ""


def judge_all(folder: Path, judge: Judge, cases: Mapping[str, Case], progress: Progress) -> dict[str, Judged]:
    """The verdicts on all cases, those that lie in ``folder`` read back.

    A verdict is written when it is there; an answer of the judge that is none is given back, and not kept.

    Raises:
        EndpointError: If the judge cannot go on; what it said is kept.
        UserError: If it says something impossible, or nothing.
    """
    path = folder / f"{safe_id(judge.name)}.jsonl"
    _refuse_contradictions(path, judge, cases)
    verdicts = {
        key: record
        for key, record in _verdicts_in(path).items()
        if key not in cases or not _wrong_with(record["outcome"], record["score"], cases[key].metric)
    }
    waiting = [case for key, case in cases.items() if key not in verdicts]
    if told := _reused(path, judge, [verdicts[key] for key in cases if key in verdicts], len(cases)):
        progress.say(told)
    address = getattr(judge, "address", None)
    shorter = "a larger --batch, a GPU, or a judge behind an --endpoint"
    task = progress.task(f"judge {judge.name}", len(cases), done=len(cases) - len(waiting), shorter=shorter)
    try:
        for key, verdict in said_of(judge, waiting):
            verdicts[key] = {"key": key, "outcome": verdict.outcome, "score": verdict.score, "raw": verdict.raw}
            if served := served_as(verdict.raw):
                verdicts[key]["served"] = served
            if isinstance(address, str):
                verdicts[key]["address"] = address
            if verdict.outcome == NOT_JUDGED:
                verdicts[key]["reason"] = verdict.reason
            else:
                append_jsonl(path, verdicts[key])
            task.advance()
    except UnfitModelError:
        raise
    except EndpointError as e:
        missing = len(cases.keys() - verdicts.keys())
        raise EndpointError(
            f"{missing} of {len(cases)} completions were not judged, the first failure: {str(e).rstrip('.')}. Verdicts "
            "that came are kept and the run's results stay as they were: mend the cause, then run the same command "
            "again."
        ) from e
    if missing := len(cases.keys() - verdicts.keys()):
        raise UserError(f"judge `{judge.name}` must say something of every case, of {missing} it said nothing.")
    kept = [record for record in verdicts.values() if record["outcome"] != NOT_JUDGED]
    if len(read_jsonl(path)) > len(kept):  # of an earlier version, or impossible
        write_jsonl(path, kept)
    return verdicts
