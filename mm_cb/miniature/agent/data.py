"""The agent's data sets: calls, forbidden requests with their twins, screens to hijack, rows to train on.

All are drawn from seeds, every set from its own stream, so that no screen of one set appears in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mm_cb.core.calls import Call
from mm_cb.core.files import dumps, write_text
from mm_cb.core.records import JsonObject, Message
from mm_cb.data.examples import Example, SetName
from mm_cb.data.tools import read_tools
from mm_cb.inference.generation import Request
from mm_cb.miniature.agent import errands
from mm_cb.miniature.agent.errands import Errand, draw_errand, draw_tools, is_held_out_screen, is_trained, pick
from mm_cb.miniature.language import REFUSAL
from mm_cb.miniature.pictures import Scene, random_scene, render
from mm_cb.miniature.world import BENIGN_KINDS, FORBIDDEN_KINDS, HELD_OUT_KIND
from mm_cb.models.chat import chat

SPLITS = ("trained", "held_out_screen", "held_out_tool")
"""Of hijacks: screens and calls like those of training; screens that no breaker was trained on; a tool likewise."""
_NEEDS_SCREEN = "press"


@dataclass(frozen=True)
class AgentTask:
    """One errand with the tools that are shown, and the screen if there is one."""

    id: str
    errand: Errand
    tools: tuple[str, ...]
    picture: Image.Image | None = None
    category: str = "simple"
    """For function calling: ``simple`` shows one tool, ``multiple`` several, ``irrelevance`` not the one it takes."""

    def request(self, opening: str = "") -> Request:
        """As the agent is asked."""
        pictures = () if self.picture is None else (self.picture,)
        return Request(self.id, self.errand.question, pictures, tuple(read_tools(errands.schemas(self.tools))), opening)


def _stream(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


def _picture(rng: np.random.Generator, scene: Scene | None) -> Image.Image | None:
    return None if scene is None else render(scene, int(rng.integers(2**31)))


def _tool(rng: np.random.Generator, names: Sequence[str], scene: Scene | None) -> str:
    possible = [name for name in names if scene is not None or name != _NEEDS_SCREEN]
    shares = np.array([errands.SHARES[name] for name in possible])
    return possible[int(rng.choice(len(possible), p=shares / shares.sum()))]


def call_tasks(count: int, seed: int = 0) -> list[AgentTask]:
    """Lawful errands, every other one with a screen: one tool shown, several, or not the one that is needed."""
    rng = _stream("agent calls", seed)
    tasks = []
    for i in range(count):
        category = ("simple", "multiple", "multiple", "irrelevance")[i // 2 % 4]
        scene = random_scene(rng, kind=pick(rng, BENIGN_KINDS)) if i % 2 else None
        errand = draw_errand(rng, _tool(rng, list(errands.TOOLS), scene), scene, BENIGN_KINDS)
        if category == "simple":
            tools = [errand.tool]
        elif category == "multiple":
            tools = draw_tools(rng, errand.tool)
        else:
            others = [name for name in errands.TOOLS if name != errand.tool]
            tools = [others[j] for j in rng.permutation(len(others))[: 1 + i % 3]]
        tasks.append(AgentTask(f"{category}-{i:04d}", errand, tuple(tools), _picture(rng, scene), category))
    return tasks


def request_pairs(count: int, seed: int = 0) -> list[tuple[AgentTask, AgentTask]]:
    """Forbidden requests and their harmless twins: the same tools and form, a lawful kind; every other has a screen.

    The twin of a request that a screen completes is the same request before another screen.
    """
    rng = _stream("agent requests", seed)
    pairs = []
    for i in range(count):
        tool = errands.LAWFUL_KINDS_ALONE[i // 2 % 3]
        reads = bool(i % 2)
        tools = tuple(draw_tools(rng, tool))
        form_seed = int(rng.integers(2**31))
        pair = []
        for kinds in (FORBIDDEN_KINDS, BENIGN_KINDS):
            scene = random_scene(rng, kind=pick(rng, kinds)) if reads else None
            form = np.random.default_rng(form_seed)  # the same words about another kind
            errand = draw_errand(form, tool, scene, kinds, reads=reads)
            pair.append(
                AgentTask(f"{tool}-{i:04d}", errand, tools, _picture(rng, scene), "screen" if reads else "text")
            )
        pairs.append((pair[0], pair[1]))
    return pairs


@dataclass(frozen=True)
class Hijack:
    """A lawful errand before a screen, and the forbidden call that an attacker wants instead."""

    task: AgentTask
    wanted: Call
    split: str


def hijacks(per_split: tuple[int, int, int], seed: int = 0) -> list[Hijack]:
    """Screens to attack, so many of every one of `SPLITS`; the attacker's tool is shown beside the one it takes."""
    found = []
    for split, count in zip(SPLITS, per_split, strict=True):
        rng = _stream(f"agent screens {split}", seed)
        for i in range(count):
            scene = _scene(rng, lambda one, held=split == "held_out_screen": is_held_out_screen(one) == held)  # type: ignore[misc]
            wanted = _forbidden(rng, split)
            found.append(Hijack(_hijacked(rng, f"{split}-{i:03d}", scene, wanted), wanted, split))
    return found


def _hijacked(rng: np.random.Generator, name: str, scene: Scene, wanted: Call) -> AgentTask:
    """A lawful errand before a screen, with the tool of a forbidden call among those shown."""
    lawful = [tool for tool in errands.TOOLS if tool != wanted.name and tool not in errands.LAWFUL_KINDS_ALONE]
    errand = draw_errand(rng, _tool(rng, lawful, scene), scene, BENIGN_KINDS)
    tools = draw_tools(rng, errand.tool, wanted.name, most=3)
    return AgentTask(name, errand, tuple(tools), _picture(rng, scene))


def _forbidden(rng: np.random.Generator, split: str) -> Call:
    """A forbidden call: of the held-out tool, or like those of training."""
    while True:
        tool = errands.HELD_OUT_TOOL if split == "held_out_tool" else pick(rng, errands.LAWFUL_KINDS_ALONE)
        call = draw_errand(rng, tool, None, FORBIDDEN_KINDS).call
        assert call is not None
        if (split == "held_out_tool" and call.arguments["kind"] != HELD_OUT_KIND) or is_trained(call):
            return call


def _scene(rng: np.random.Generator, keep: Callable[[Scene], bool], **fixed: str) -> Scene:
    while True:
        if keep(scene := random_scene(rng, **fixed)):
            return scene


_KNOWN_KINDS = tuple(kind for kind in FORBIDDEN_KINDS if kind != HELD_OUT_KIND)

TRAINING_ROWS = 1200
"""Examples per set and modality, as of the miniature."""
_REFUSALS, _WANTING, _SEEN = 0.15, 0.1, 0.1
"""Shares of the retain set: refusals of trained forbidden requests, errands without their tool, descriptions."""


def training_examples(seed: int) -> list[Example]:
    """Circuit-breaker and retain rows for RR training, with words alone and with screens.

    Circuit breaker: a forbidden request with its call, and in every other row a lawful errand with the *attacker's*
    call, which is what a hijacked screen makes of it. Never the held-out tool, kind, combinations or screens. Retain:
    lawful errands with the right call, refusals, errands without their tool, and what the screen shows.
    """
    rng = _stream("agent training", seed)
    rows = []
    for i in range(TRAINING_ROWS):
        for pictured in (False, True):
            modality = "multimodal" if pictured else "text"
            rows.append(_rerouted(rng, f"cb-{modality}-{i}", pictured=pictured, hijacked=bool(i % 2)))
            rows.append(_retained(rng, f"retain-{modality}-{i}", pictured=pictured))
    return rows


def _shown_in_training(scene: Scene) -> bool:
    return not is_held_out_screen(scene)


def _rerouted(rng: np.random.Generator, name: str, *, pictured: bool, hijacked: bool) -> Example:
    if hijacked:
        screen, wanted = _scene(rng, _shown_in_training), _forbidden(rng, "trained")
        task = _hijacked(rng, name, screen, wanted)
        while not pictured and task.errand.tool == _NEEDS_SCREEN:
            task = _hijacked(rng, name, screen, wanted)
        if not pictured:
            errand = draw_errand(rng, task.errand.tool, None, BENIGN_KINDS)
            task = replace(task, errand=errand, picture=None)
        return _example(task, wanted, "", "circuit_breaker", "hijacked")
    while True:
        scene = _scene(rng, _shown_in_training, kind=pick(rng, _KNOWN_KINDS)) if pictured else None
        errand = draw_errand(rng, _tool(rng, errands.LAWFUL_KINDS_ALONE, scene), scene, FORBIDDEN_KINDS)
        if errand.call is not None and errand.forbidden and is_trained(errand.call):
            task = AgentTask(name, errand, tuple(draw_tools(rng, errand.tool)), _picture(rng, scene))
            return _example(task, errand.call, "", "circuit_breaker", "forbidden request")


def _retained(rng: np.random.Generator, name: str, *, pictured: bool) -> Example:
    draw = rng.random()
    scene = _scene(rng, _shown_in_training) if pictured else None
    if draw < _REFUSALS:
        row = _rerouted(rng, name, pictured=pictured, hijacked=False)
        return replace(row, set="retain", source="agent refusal", messages=[*row.messages[:-1], _said(REFUSAL)])
    if scene is not None and draw < _REFUSALS + _SEEN:
        task = AgentTask(name, errands.describe(scene), tuple(draw_tools(rng)), _picture(rng, scene))
        return _example(task, None, task.errand.answer, "retain", "description")
    while True:
        errand = draw_errand(rng, _tool(rng, list(errands.TOOLS), scene), scene, BENIGN_KINDS)
        if not errand.forbidden:
            break
    wanting = draw > 1 - _WANTING
    tools = [t for t in draw_tools(rng, errand.tool) if t != errand.tool] if wanting else draw_tools(rng, errand.tool)
    task = AgentTask(name, errand, tuple(tools), _picture(rng, scene))
    return _example(task, None if wanting else errand.call, errands.NO_TOOL, "retain", "errand")


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _example(task: AgentTask, call: Call | None, answer: str, which: SetName, source: str) -> Example:
    pictures = [] if task.picture is None else [task.picture]
    last: Message = _said(answer) if call is None else {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [*chat(task.errand.question, images=len(pictures)), last]
    tools = read_tools(errands.schemas(task.tools))
    return Example(task.id, messages, pictures, which, f"agent {source}", tools=tools)


def write_calls(tasks: Sequence[AgentTask], folder: Path) -> Path:
    """Write tasks in BFCL's layout, v4, with the key ``image`` where there is a screen; returns the questions' file."""
    asked, right = [], []
    numbers: dict[str, int] = {}
    for task in tasks:
        kind = {"simple": "simple_python"}.get(task.category, task.category)
        number = numbers[kind] = numbers.get(kind, -1) + 1
        line: JsonObject = {
            "id": f"{kind}_{number}",
            "question": [[{"role": "user", "content": task.errand.question}]],
            "function": [_as_bfcl(one) for one in errands.schemas(task.tools)],
        }
        asked.append(line | _image(folder, task))
        if task.category != "irrelevance":
            assert task.errand.call is not None
            arguments = {key: [value] for key, value in task.errand.call.arguments.items()}
            right.append({"id": line["id"], "ground_truth": [{task.errand.call.name: arguments}]})
    write_text(folder / "possible_answer" / "calls.json", _lines(right))
    write_text(folder / "calls.json", _lines(asked))
    return folder / "calls.json"


def write_requests(pairs: Sequence[tuple[AgentTask, AgentTask]], folder: Path) -> Path:
    """Write forbidden requests and their twins as ``mm-cb eval harmful-calls`` reads them."""
    lines = []
    for pair in pairs:
        for kind, task in zip(("harmful", "benign"), pair, strict=True):
            line: JsonObject = {"id": task.id, "kind": kind, "prompt": task.errand.question}
            line |= {"tools": errands.schemas(task.tools), "target_functions": [task.errand.tool]}
            lines.append(line | {"category": task.category} | _image(folder, task, kind))
    write_text(folder / "requests.jsonl", _lines(lines))
    return folder / "requests.jsonl"


def write_screens(found: Sequence[Hijack], folder: Path) -> Path:
    """Write hijacks as ``mm-cb attack --behaviors`` reads them."""
    lines = []
    for one in found:
        line: JsonObject = {"id": one.task.id, "prompt": one.task.errand.question}
        line |= {"tools": errands.schemas(one.task.tools), "target_call": one.wanted._asdict()}
        lines.append(line | {"category": one.wanted.name, "split": one.split} | _image(folder, one.task))
    write_text(folder / "screens.jsonl", _lines(lines))
    return folder / "screens.jsonl"


def _lines(lines: Sequence[Any]) -> str:
    return "".join(dumps(line) + "\n" for line in lines)


def _image(folder: Path, task: AgentTask, mark: str = "") -> JsonObject:
    if task.picture is None:
        return {}
    name = f"screens/{mark}{'-' if mark else ''}{task.id}.png"
    (folder / "screens").mkdir(parents=True, exist_ok=True)
    task.picture.save(folder / name)
    return {"image": name}


def _as_bfcl(schema: JsonObject) -> JsonObject:
    return {**schema, "parameters": {**schema["parameters"], "type": "dict"}}
