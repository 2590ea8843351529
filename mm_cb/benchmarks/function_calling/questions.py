"""BFCL's files, v1 and v4, or rows of one's own in v4's layout: what is asked, and which calls are right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm_cb.benchmarks.function_calling.rules import NESTED, TYPES, Expected
from mm_cb.benchmarks.rows import DataRow, json_lines
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import CALLS, RIGHT_CALLS
from mm_cb.core.reading import shown, unfit
from mm_cb.core.records import JsonObject
from mm_cb.data.pictures import path_inside
from mm_cb.data.prompt_mode import prompt_mode

NON_LIVE = ("simple", "multiple", "parallel", "parallel_multiple")
LIVE = tuple(f"live_{name}" for name in NON_LIVE)
IRRELEVANCE = ("irrelevance", "live_irrelevance")
RELEVANCE = ("live_relevance",)
ANSWERS = "possible_answer"
"""The folder beside the questions that holds the right calls, in files of the same names."""
LEFT_OUT = "Java, JavaScript, several turns, agents, Exec"
_V1 = {
    "simple": "simple",
    "multiple_function": "multiple",
    "parallel_function": "parallel",
    "parallel_multiple_function": "parallel_multiple",
    "relevance": "irrelevance",
}
_V4 = {"simple_python": "simple"} | {
    name: name for name in ("multiple", "parallel", "parallel_multiple", *LIVE, *IRRELEVANCE, *RELEVANCE)
}
_OTHERS = re.compile(
    r"(simple_java|simple_javascript|java|javascript|multi_turn|memory|web_search|exec|executable|rest|sql|chatable|format)"
)
"""How categories begin that are not scored here, in ids and names of files."""
_ID = re.compile(r"(?P<kind>[a-z_]+?)_(?P<rest>[0-9].*)")
_FILE = re.compile(r"(?:BFCL|gorilla_openfunctions)_v(?P<version>\d+)_(?:test_)?(?P<category>.*)")
_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""BFCL's words for types, as JSON schemas have them."""


class CallQuestion(NamedTuple):
    """One row."""

    id: str
    version: int
    """BFCL's, 1 or 4."""
    category: str
    question: str
    functions: Sequence[JsonObject]
    expected: Sequence[Expected]
    """Nothing where no call is right, or any."""
    image: Path | None = None
    """A screen in front of the request; in rows of one's own."""


def read_asked(data: str) -> list[CallQuestion]:
    """The rows of a file of questions, or of all in a folder; other categories than the scored ones are passed over.

    Raises:
        UserError: If a file is of another version, lacks its answers, or a row is not as expected.
    """
    path = Path(data)
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in (".json", ".jsonl"))
    if not files:
        there = "it holds none" if path.is_dir() else "there is none"
        raise UserError(
            f"`{data}` must be a file of BFCL's questions or a folder of such, {there}; the right calls lie beside it "
            f"in `{ANSWERS}/`."
        )
    found = [asked for file in files for asked in _read_file(file)]
    if not found:
        raise UserError(f"`{data}` must hold questions that are scored here, all of it is left out: {LEFT_OUT}.")
    if len({asked.version for asked in found}) > 1:
        raise UserError(f"`{data}` must hold questions of one version of BFCL, it holds v1 and v4; give one of them.")
    return found


def version_and_category(id: str) -> tuple[int, str] | None:
    """BFCL's version and our category of a question's id; None for categories that are not scored here.

    Raises:
        ValueError: If it is no id of BFCL's v1 or v4.
    """
    named = _ID.fullmatch(id)
    kind = "" if named is None else named["kind"]
    if kind in _V1:
        return 1, _V1[kind]
    if kind in _V4:
        return 4, _V4[kind]
    if _OTHERS.match(id):
        return None
    raise ValueError(
        f"an id must begin with its category and go on with a number, such as `simple_python_0`, got {shown(id)}"
    )


def is_scored(file: Path) -> bool | None:
    """Whether a file's name is BFCL's and of a category that is scored here; None for names of one's own.

    Files of other categories need not be rows at all, and are not opened.
    """
    named = _FILE.match(file.name)
    return None if named is None else _OTHERS.match(named["category"]) is None


def prompt(asked: CallQuestion) -> str:
    """The request in BFCL's prompt mode, system text first."""
    return prompt_mode(asked.functions, asked.question, asked.version)


def tools(asked: CallQuestion, *, underscores: bool) -> tuple[JsonObject, ...]:
    """The functions as JSON schemas, as chat templates take tools."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": called(one["name"], underscores=underscores),
                "description": one.get("description", ""),
                "parameters": _schema(one["parameters"]),
            },
        }
        for one in asked.functions
    )


def called(name: str, *, underscores: bool) -> str:
    """A function's name as a model says it that knows no dots in names."""
    return name.replace(".", "_") if underscores else name


def _schema(value: Any) -> Any:
    """BFCL's types as those of JSON schemas, at every depth."""
    if isinstance(value, list):
        return [_schema(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _SCHEMA_TYPES.get(held, held) if key == "type" and isinstance(held, str) else _schema(held)
        for key, held in value.items()
    }


def _read_file(file: Path) -> Iterator[CallQuestion]:
    named = _FILE.match(file.name)
    if named and named["version"] not in ("1", "4"):
        raise UserError(
            f"`{file}` must be of BFCL v1 or v4, it is of v{named['version']}; take the files of bfcl_eval/data."
        )
    if is_scored(file) is False:
        return
    answers: dict[str, DataRow] | None = None
    for row in json_lines(file, (CALLS,)):
        try:
            kind = version_and_category(_text(row.values.get("id"), "id"))
            if kind is None:
                continue
            version, category = kind
            asked = row.values["id"], version, category, _question(row.values.get("question"), version)
            functions = _functions(row.values.get("function"), none=category in IRRELEVANCE)
            image = row.values.get("image")
            image = None if image is None else path_inside(file.parent.resolve(), image)
            if category in (*IRRELEVANCE, *RELEVANCE):
                yield CallQuestion(*asked, functions, (), image)
                continue
        except ValueError as error:
            raise UserError(f"{row.where}: {error}.") from error
        answers = _answers(file) if answers is None else answers
        if asked[0] not in answers:
            raise UserError(
                f"`{file.parent / ANSWERS / file.name}` must hold the right calls of `{asked[0][:80]}`, it has none."
            )
        answer = answers[asked[0]]
        try:
            expected = _expected(answer.values.get("ground_truth"), functions, version, category)
            yield CallQuestion(*asked, functions, expected, image)
        except ValueError as error:
            raise UserError(f"{answer.where}: {error}.") from error


def _answers(file: Path) -> dict[str, DataRow]:
    path = file.parent / ANSWERS / file.name
    if not path.is_file():
        raise UserError(f"`{file}` must have its right calls in `{path}`, there is no such file.")
    found: dict[str, DataRow] = {}
    for row in json_lines(path, (RIGHT_CALLS,)):
        id = str(row.values.get("id"))
        if id in found:
            raise UserError(f"{row.where}: every question must have one line of right calls, `{id[:80]}` comes again.")
        found[id] = row
    return found


def _question(value: Any, version: int) -> str:
    """v1's text; v4's one list of turns, as one text."""
    if version == 1:
        if isinstance(value, list):
            raise ValueError("`question` of v1 must be a text, got turns; these are rows of v2 or v3: give v1 or v4")
        return _text(value, "question")
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], list) or not value[0]:
        raise ValueError(f"`question` must be a list of one list of turns (role, content), got {shown(value)}")
    turns = value[0]
    if not all(isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant") for turn in turns):
        raise ValueError(f"`question` must hold turns of system, user or assistant, got {shown(turns)}")
    said = [(turn["role"], _text(turn.get("content"), "content")) for turn in turns]
    several = any(role == "assistant" for role, _ in said)
    return "\n\n".join(f"{role}: {text}" if several else text for role, text in said)


def _functions(value: Any, *, none: bool) -> list[JsonObject]:
    """Function definitions that the rules can read; perhaps none."""
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list) or not (found or none):
        raise ValueError(f"`function` must be a list of definitions with name and parameters, got {shown(value)}")
    for one in found:
        name = _text(one.get("name") if isinstance(one, dict) else None, "function.name")
        parameters = one.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(held, dict) for held in properties.values()):
            raise ValueError(
                f"`{name}` must have a JSON schema with `properties` as its parameters, got {shown(parameters)}"
            )
        required = parameters.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) and key in properties for key in required):
            raise ValueError(f"`required` of `{name}` must name its parameters, got {shown(required)}")
        for key, held in properties.items():
            _check_type(f"`{key}` of `{name}`", held)
    return found


def _check_type(who: str, schema: Mapping[str, Any]) -> None:
    declared = schema.get("type")
    if not isinstance(declared, str) or declared not in TYPES:
        raise ValueError(f"{who} must have one of the types {', '.join(TYPES)}, got {shown(declared)}")
    if declared in NESTED:
        items = schema.get("items")
        inner = items.get("type") if isinstance(items, dict) else None
        if not isinstance(inner, str) or inner not in TYPES:
            raise ValueError(f"{who} must say the type of its items, one of {', '.join(TYPES)}, got {shown(inner)}")


def _expected(value: Any, functions: Sequence[JsonObject], version: int, category: str) -> list[Expected]:
    pairs = [(value,)] if isinstance(value, dict) and version == 1 else None
    if pairs is not None:  # v1: one object, parallel calls of one function told apart by what follows its name
        entries = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(one, dict) and len(one) == 1 for one in value):
        entries = [next(iter(one.items())) for one in value]
    else:
        raise ValueError(f"`ground_truth` must be a list of objects with one function each, got {shown(value)}")
    if not entries or ("parallel" not in category and len(entries) != 1):
        raise ValueError(f"`ground_truth` of a question of `{category}` must hold one call, got {len(entries)}")
    return [_one_expected(name, possible, functions, version) for name, possible in entries]


def _one_expected(name: str, possible: Any, functions: Sequence[JsonObject], version: int) -> Expected:
    fits = (one for one in functions if (one["name"] in name if version == 1 else one["name"] == name))
    function = functions[0] if version == 1 and len(functions) == 1 else next(fits, None)
    if function is None:
        if version == 1 and not isinstance(possible, dict):  # a slip of the original, which no answer gets right
            return Expected("", (), {}, {})
        known = ", ".join(str(one["name"]) for one in functions)
        raise ValueError(f"a right call must be of one of the question's functions ({known}), got `{name}`")
    if not isinstance(possible, dict) or not all(isinstance(one, list) for one in possible.values()):
        raise ValueError(f"`{name}` must have a list of possible values for every argument, got {shown(possible)}")
    parameters = function["parameters"]
    return Expected(function["name"], parameters.get("required", []), parameters["properties"], possible)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` must be a text that is not empty, got {shown(value)}")
    if reason := unfit(value):
        raise ValueError(f"`{name}` cannot be used: {reason}")
    return value
