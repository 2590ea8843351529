"""Rows of tool calls over given functions: one model writes requests, another carries them out, answer by answer.

Every answer that was paid for is on disk before the next one is used; the same command started again asks only for what
is not there. What the models are told comes from the user's templates: none is shipped.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict

from mm_cb.core.calls import FORMATS, Call, NotCalls
from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.files import text_sha256, write_jsonl
from mm_cb.core.reading import json_lines, unfit
from mm_cb.core.records import JsonObject, Message
from mm_cb.core.runs import RunDirectory
from mm_cb.core.slots import refuse_other_braces
from mm_cb.data.asked import Failures, Stage, refuse_numbers, until_fit
from mm_cb.data.contamination import Contamination
from mm_cb.data.examples import SetName
from mm_cb.data.generated import objects
from mm_cb.data.prompt_mode import prompt_mode
from mm_cb.data.tools import as_json, read_calls, read_tools

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress

FUNCTIONS, REQUEST = "{functions}", "{request}"
_SLOTS = re.compile(r"\{(?:functions|request)\}")
THRESHOLD = 0.1
"""BLEU above which a request is too close to one that is evaluated: the paper's, of function calls."""
STYLES = ("tools", "prompt")
_HASH = 16


@dataclass(frozen=True)
class CallRecipe:
    """Everything that decides the set; a folder made by another recipe is refused."""

    requester: str
    executor: str
    request_template: str
    call_template: str
    set: SetName = "circuit_breaker"
    style: str = "tools"
    """``tools``: rows with tools and calls, for models whose chat template takes them; ``prompt``: texts in BFCL's
    words, for others."""
    format: str = "python"
    """How the executor writes calls, of `mm_cb.core.calls.FORMATS`."""
    limit: int | None = None
    """Use a seeded sample of so many lines of functions."""
    attempts: int = 3
    """Answers to a question before it is given up: broken, refused or contaminated ones are asked for again."""
    max_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check templates, names and numbers.

        Raises:
            UserError: If a template lacks a place, a name is unknown, or a number is out of range.
        """
        refuse_numbers(self)
        for name, given, known in (("style", self.style, STYLES), ("format", self.format, FORMATS)):
            if given not in known:
                raise unknown(name, given, known)
        for what, text, slots in (
            ("request template", self.request_template, [FUNCTIONS]),
            ("call template", self.call_template, [FUNCTIONS, REQUEST]),
        ):
            refuse_other_braces(text, (FUNCTIONS[1:-1], REQUEST[1:-1]), f"the {what}")
            if lacking := [slot for slot in slots if slot not in text]:
                raise UserError(f"the {what} must hold {lacking[0]} where that goes, it does not.")
        if REQUEST in self.request_template:
            raise UserError(f"the request template must not hold {REQUEST}: there is none yet; take it out.")


@dataclass
class BuiltCalls:
    """What was built."""

    path: Path
    """The JSONL file of training rows."""
    rows: int = 0
    functions: int = 0
    """Different lists of functions that were to be used."""
    rejected: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    stopped: str = ""


class CallReply(TypedDict, total=False):
    """One line of a journal: what was said, or why nothing was."""

    sha256: Required[str]
    """Of what was asked about: functions, or functions and request."""
    answer: str
    refused: str


def read_functions(file: Path, limit: int | None = None, seed: int = 0) -> dict[str, list[JsonObject]]:
    """Lists of functions by their hash, each once.

    Args:
        file: JSON lines with ``tools``, as training rows have them; rows themselves are taken too.
        limit: A seeded sample of so many; None = all.
        seed: Of the sample.

    Raises:
        UserError: If a line has no such functions, or there is none.
    """
    found: dict[str, list[JsonObject]] = {}
    for where, values in json_lines(file, "functions"):
        try:
            tools = read_tools(values.get("tools"))
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from error
        found.setdefault(text_sha256(_written(tools)), tools)
    if not found:
        raise UserError(f"`{file}` must hold a line with `tools`, it is empty.")
    if limit is not None and limit < len(found):
        kept = random.Random(f"functions {seed}").sample(sorted(found), limit)
        found = {key: found[key] for key in found if key in set(kept)}
    return found


def build_calls(
    functions: Path,
    out: Path,
    recipe: CallRecipe,
    *,
    requester: Endpoint,
    executor: Endpoint,
    evaluated: Sequence[str] = (),
    progress: Progress | None = None,
) -> BuiltCalls:
    """Build the set, or go on with the one that ``out`` holds.

    Args:
        functions: See `read_functions`.
        out: Gets ``calls.jsonl`` (training rows), ``provenance.jsonl``, and the answers as they came.
        recipe: What to ask for.
        requester: Writes a request as a JSON object ``{"request": ...}``, as its template tells it to.
        executor: Writes the calls that carry it out, in the recipe's format.
        evaluated: Prompts that models will be tested with; requests with BLEU > `THRESHOLD` against one are dropped.
        progress: Shows counts.

    Raises:
        UserError: If there are no functions, or ``out`` belongs to another recipe.
    """
    known = read_functions(functions, recipe.limit, recipe.seed)
    templates = {name: text_sha256(getattr(recipe, name)) for name in ("request_template", "call_template")}
    tested = {"evaluated": text_sha256("\0".join(evaluated)) if evaluated else "none"}
    fields = {**asdict(recipe), **templates, **tested}
    with RunDirectory(out, "data build calls", fields, recipe.seed, inputs=[functions]) as run:
        built = BuiltCalls(out / "calls.jsonl", functions=len(known))
        failures = Failures("functions", {key: _names(tools) for key, tools in known.items()}, built)
        near = Contamination(evaluated, THRESHOLD) if evaluated else None
        requests = _requests(known, out / "requests.jsonl", recipe, requester, near, failures, progress)
        calls = _calls(known, requests, out / "answers.jsonl", recipe, executor, failures, progress)
        _write(known, requests, calls, out, recipe)
        write_jsonl(out / "failures.jsonl", failures.records)
        built.rows = len(calls)
        if not built.left:
            run.finish()
    return built


def parse_request(answer: str) -> tuple[str] | str:
    """The request in an answer's JSON object; else, as a text, what is wrong."""
    found = [one["request"] for one in objects(answer) if isinstance(one.get("request"), str)]
    if not found:
        return "no JSON object with a request"
    request = found[0].strip()
    return "holds what is no character" if unfit(request) else (request,) if request else "empty request"


def parse_calls(answer: str, format: str, tools: Sequence[JsonObject]) -> list[Call] | str:
    """The calls of an answer, allowed by their schemas; else, as a text, what is wrong."""
    try:
        calls = FORMATS[format].read(answer).calls
        told = [{"name": call.name, "arguments": as_json(call.arguments)} for call in calls]
        return read_calls(told, tools) or "no call"
    except NotCalls:
        return "no call that can be read"
    except ValueError:
        return "a call that its schema forbids"


def _requests(
    known: Mapping[str, list[JsonObject]],
    journal: Path,
    recipe: CallRecipe,
    endpoint: Endpoint,
    near: Contamination | None,
    failures: Failures,
    progress: Progress | None,
) -> dict[str, tuple[tuple[str], int]]:
    def read(_: str, answer: str) -> tuple[str] | str:
        found = parse_request(answer)
        close = isinstance(found, tuple) and near is not None and near.match(found[0])
        return "too close to what is evaluated" if close else found

    sent = {key: _filled(recipe.request_template, tools) for key, tools in known.items()}
    return until_fit(sent, _stage("request", journal, recipe), endpoint, read, failures, progress)


def _calls(
    known: Mapping[str, list[JsonObject]],
    requests: Mapping[str, tuple[tuple[str], int]],
    journal: Path,
    recipe: CallRecipe,
    endpoint: Endpoint,
    failures: Failures,
    progress: Progress | None,
) -> dict[str, tuple[list[Call], int]]:
    def read(key: str, answer: str) -> list[Call] | str:
        return parse_calls(answer, recipe.format, known[key])

    sent = {key: _filled(recipe.call_template, known[key], request) for key, ((request,), _) in requests.items()}
    return until_fit(sent, _stage("answer", journal, recipe), endpoint, read, failures, progress)


def _stage(name: str, journal: Path, recipe: CallRecipe) -> Stage:
    doing = {"request": "write requests", "answer": "carry them out"}[name]
    return Stage(name, doing, journal, CallReply, "sha256", recipe.attempts, recipe.max_tokens, recipe.temperature)


def _filled(template: str, tools: Sequence[JsonObject], request: str = "") -> list[Message]:
    filled = {FUNCTIONS: _written(tools), REQUEST: request}
    return [{"role": "user", "content": _SLOTS.sub(lambda place: filled[place[0]], template)}]


def _written(tools: Sequence[JsonObject]) -> str:
    return json.dumps([one["function"] for one in tools], ensure_ascii=False, indent=2)


def _names(tools: Sequence[JsonObject]) -> str:
    return ", ".join(str(one["function"]["name"]) for one in tools)


def _write(
    known: Mapping[str, list[JsonObject]],
    requests: Mapping[str, tuple[tuple[str], int]],
    calls: Mapping[str, tuple[list[Call], int]],
    out: Path,
    recipe: CallRecipe,
) -> None:
    """The rows in the functions' order, and where each of them comes from."""
    rows, origins = [], []
    for key, tools in known.items():
        if key not in calls:
            continue
        ((request,), asked), (made, attempt) = requests[key], calls[key]
        id = f"{recipe.set}-call-{key[:_HASH]}"
        rows.append(_row(id, request, made, tools, recipe))
        origin = {"id": id, "functions_sha256": key, "requester": recipe.requester, "executor": recipe.executor}
        origins.append(origin | {"request_attempt": asked, "attempt": attempt})
    write_jsonl(out / "calls.jsonl", rows)
    write_jsonl(out / "provenance.jsonl", origins)


def _row(id: str, request: str, calls: Sequence[Call], tools: Sequence[JsonObject], recipe: CallRecipe) -> JsonObject:
    fixed: JsonObject = {"images": [], "set": recipe.set, "source": "built calls"}
    if recipe.style == "prompt":
        asked: Message = {"role": "user", "content": prompt_mode([one["function"] for one in tools], request)}
        said: Message = {"role": "assistant", "content": FORMATS["python"].write(calls)}
        return {"id": id, "messages": [asked, said], **fixed}
    told = [{"name": call.name, "arguments": call.arguments} for call in calls]
    messages = [{"role": "user", "content": request}, {"role": "assistant", "tool_calls": told}]
    return {"id": id, "messages": messages, **fixed, "tools": [one["function"] for one in tools]}
