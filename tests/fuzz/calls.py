"""What reads a user's file: one function a kind, given the folder; a value, or whatever it raises."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from image_attacks import ImageFileError, load_png, open_image
from mm_cb.core.errors import UserError
from tests.fuzz.samples import CHAT, FROZEN, INPUTS


def plain(value: Any) -> None:
    """Refuse what reads well and breaks later: texts that no file can hold, pictures that cannot be opened."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, Mapping):
        plain([*value.keys(), *value.values()])
    elif is_dataclass(value) and not isinstance(value, type):
        plain([getattr(value, name) for name in value.__dataclass_fields__])
    elif isinstance(value, list | tuple):
        for one in value:
            plain(one)


def behaviors(folder: Path, name: str = "behaviors.jsonl") -> None:
    from mm_cb.data.behaviors_file import read_behaviors
    from mm_cb.data.benign import build_benign
    from mm_cb.data.contamination import read_tested

    plain(read_behaviors(folder / name))
    plain(read_tested(folder / name))
    build_benign(folder / name, folder / "out")


def corpus(folder: Path) -> None:
    from mm_cb.data.corpus import read_corpus

    plain(read_corpus(next(folder.glob("c.*"))))


def prompts(folder: Path) -> None:
    from mm_cb.data.contamination import read_tested

    plain(read_tested(next(folder.glob("p.*"))))


def requests(folder: Path) -> None:
    from mm_cb.benchmarks.over_refusal.data import read_requests

    (data,) = folder.glob("requests.*")
    plain(read_requests(data))


def mixture(folder: Path) -> None:
    """Training rows as a recipe names them."""
    from mm_cb.data.check import Limits, check_sources
    from mm_cb.data.mixture import load_examples
    from mm_cb.data.sources import Source

    source = Source(str(next(folder.glob("rows*"))))
    check_sources([source], Limits())
    for example in load_examples([source], 0):
        plain([example.id, example.messages, example.source])
        example.open_images()


def records(folder: Path) -> None:
    from mm_cb.data.records import as_examples

    try:
        rows = json.loads((folder / "r.json").read_bytes())
    except (ValueError, RecursionError):
        return
    for example in as_examples(rows):
        example.open_images()


def built(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from mm_cb.data.behaviors import build_behaviors
        from mm_cb.data.behaviors_file import read_behaviors

        made = build_behaviors(folder / "out", **{name: folder})
        plain(read_behaviors(made.path))

    return read


def scenarios(folder: Path) -> None:
    from mm_cb.data.behaviors import read_scenarios

    plain(read_scenarios(folder / "s.json"))


def targets(folder: Path) -> None:
    from mm_cb.data.benign import read_targets

    plain(read_targets(folder / "t.txt"))


def cards(folder: Path) -> None:
    from mm_cb.data import cards

    with mock.patch.object(cards, "data_path", lambda *_: folder):
        for found in cards.cards().values():
            plain(found)
            cards.whereabouts(found)


def recipe(folder: Path) -> None:
    from mm_cb.core.recipe_files import recipe_text
    from mm_cb.training.recipes.recipe import load_recipe

    recipe_text(folder / "r.yaml")
    plain(load_recipe(folder / "r.yaml", ["training.max_steps=3"]).model_dump(mode="json"))


def prompt_files(folder: Path) -> None:
    from mm_cb.benchmarks.llava_wild.judging import read_own_rule
    from mm_cb.cli.options import read_system
    from mm_cb.judges.prompts import fill, read_template

    for read in (read_system, read_own_rule):
        with suppress(UserError):
            plain(read(folder / "p.txt"))
    fill(read_template(folder / "p.txt"), {"behavior": "b", "completion": "c"})


def judge_card(folder: Path) -> None:
    from mm_cb.judges.classifiers import harmbench_prompts
    from mm_cb.judges.prompts import check_judge_template

    for name, text in harmbench_prompts(str(folder)).items():
        plain([name, check_judge_template(text, "the card")])


def answers(folder: Path) -> None:
    from mm_cb.benchmarks.llava_wild.reviews import parse_scores
    from mm_cb.benchmarks.mmmu.parse import parse_multiple_choice, parse_open
    from mm_cb.benchmarks.pope import strict_answer
    from mm_cb.core.calls import FORMATS, NotCalls
    from mm_cb.data.generated import parse_pair
    from mm_cb.metrics.degenerate import degenerate

    text = (folder / "a.txt").read_bytes().decode("utf-8", "replace")
    for read in (parse_pair, parse_scores, parse_open, strict_answer, degenerate):
        read(text)
    for format in FORMATS.values():
        with suppress(NotCalls):
            format.read(text)
    parse_multiple_choice(text, ["A", "B"], {"A": "red", "B": "blue"})


def pope(folder: Path) -> None:
    from mm_cb.benchmarks.pictures import fingerprint, ready
    from mm_cb.benchmarks.pope import Pope, PopeAnswers, PopeSettings

    (data,) = (file for file in folder.iterdir() if file.stem == "pope")
    questions = Pope().questions(str(data), PopeSettings())
    fingerprint(questions)
    ready(questions)
    for question in questions:
        plain([question.id, question.prompt, question.reference])
    if (stored := folder / "answers.jsonl").is_file():
        plain(Pope().stored_answers(PopeAnswers(answers=str(stored)), questions))


def function_calling(folder: Path) -> None:
    from mm_cb.benchmarks.base import all_answers
    from mm_cb.benchmarks.function_calling.benchmark import CallSettings, FunctionCalling
    from mm_cb.benchmarks.function_calling.stored import answer_files, read_answers

    benchmark = FunctionCalling()
    questions = benchmark.questions(str(folder / "q.json"), CallSettings())
    said = all_answers(read_answers(answer_files(folder / "said")), questions, "said")
    for question in questions:
        plain([question.id, question.prompt, question.reference])
        benchmark.score(question, said[question.id])


def harmful_calls(folder: Path) -> None:
    from mm_cb.benchmarks.harmful_calls.rows import read_harmful_rows

    for row in read_harmful_rows(
        str(folder / "h.jsonl"), str(folder / "tools.json"), split="test_public", accepted=False
    ):
        plain([row.id, row.prompt, row.tools, row.targets, row.category])


def functions(folder: Path) -> None:
    from mm_cb.data.built_calls import read_functions

    plain(read_functions(folder / "f.jsonl"))


def target_calls(folder: Path) -> None:
    from mm_cb.data.behaviors_file import read_behaviors

    for behavior in read_behaviors(folder / "behaviors.jsonl"):
        plain([behavior.id, behavior.prompt, behavior.call and behavior.call.call, behavior.tools])


def agentharm(folder: Path) -> None:
    from mm_cb.benchmarks.harmful_calls.rows import read_harmful_rows

    for row in read_harmful_rows(str(folder), str(folder / "tools.json"), split="validation", accepted=True):
        plain([row.id, row.prompt, row.tools, row.targets, row.category])


def wild(folder: Path) -> None:
    from mm_cb.benchmarks.llava_wild.questions import fingerprint, read_questions

    questions = read_questions(str(folder / "wild"))
    fingerprint(questions)
    for question in questions:
        plain([question.id, question.text, question.caption, question.reference])


def reviews(folder: Path) -> None:
    from mm_cb.benchmarks.llava_wild.stored import run_reviews, show

    files = sorted(folder.glob("*.jsonl"))
    run_reviews(files, folder / "out", official_failures=False, seed=0)
    show(folder / "out")


def mmmu(folder: Path) -> None:
    from mm_cb.benchmarks.mmmu.benchmark import MmmuSettings
    from mm_cb.benchmarks.mmmu.questions import as_asked, fingerprint, read_questions
    from mm_cb.data.pictures import shown as picture_shown

    questions = read_questions(str(folder / "mmmu"), MmmuSettings(subjects=("Art", "Music")))
    fingerprint(questions)
    for question in questions:
        asked = as_asked(question, "official", "named")
        plain([asked.id, asked.prompt])
        for picture in asked.pictures:
            picture_shown(picture)


def mmmu_responses(folder: Path) -> None:
    from mm_cb.benchmarks.mmmu.score import score_responses
    from mm_cb.benchmarks.mmmu.stored import read_predictions, read_responses, response_files

    plain(read_predictions(folder / "p.json", folder / "k.json", ()))
    score_responses(read_responses(response_files(folder, ("Art",))))


def pictures(folder: Path) -> None:
    """Training, attack, evaluation and report: all show the same pixels of a file, or all refuse it."""
    from mm_cb.attacks.saved import read
    from mm_cb.benchmarks.pictures import picture_inside, stored_picture
    from mm_cb.data.examples import Example
    from mm_cb.data.pictures import open_picture
    from mm_cb.data.records import as_examples
    from mm_cb.report.gallery import read_picture

    (file,) = folder.iterdir()
    data = file.read_bytes()
    row = {"messages": CHAT, "images": [data], "set": "retain"}
    exact: tuple[Callable[[], Any], ...] = (lambda: load_png(file), lambda: read(folder, file.name))
    readers: tuple[Callable[[], Any], ...] = (
        lambda: open_image(file),
        lambda: open_picture(file),
        lambda: picture_inside(folder, file.name, "row 0").open(),
        lambda: stored_picture({"bytes": data}, "row 0").open(),
        lambda: Example("a", CHAT, [file], "retain").open_images()[0],
        *((lambda: as_examples([row])[0].open_images()[0],) if data else ()),
    )
    for one in exact:
        with suppress(ImageFileError):
            one()
    read_picture(folder, file.name)
    said, shown = [], set()
    for one in readers:
        try:
            shown.add(one().tobytes())
        except (UserError, ImageFileError) as error:
            said.append(error)
    assert len(said) in (0, len(readers)) and len(shown) == (not said), (said, len(shown))
    if said:
        raise said[0]


def report(folder: Path) -> None:
    from mm_cb.report import page

    with mock.patch.object(page, "curve_charts", curve_charts):
        page.write_report([folder / "run"], folder / "page.html")


_DRAWN: dict[str, object] = {}


def curve_charts(curves: Sequence[object]) -> object:
    """The page's, which takes most of its time: those of the same curves under the same names are drawn once."""
    from mm_cb.report import charts, labels

    drawn_from = repr((curves, labels.CONDITIONS))
    if drawn_from not in _DRAWN:
        _DRAWN[drawn_from] = charts.curve_charts(curves)
    return _DRAWN[drawn_from]


def judged_again(folder: Path) -> None:
    from mm_cb.core.progress import Progress
    from mm_cb.judges.rejudge import rejudge
    from mm_cb.judges.rules import RefusalStrings
    from mm_cb.report.load import load_run

    with Progress() as progress:
        rejudge(folder / "run", RefusalStrings(), behaviors=folder / "two.jsonl", progress=progress)
    load_run(folder / "run")


class _Loaded(UserError):
    """Stands for the model, which these files come before."""


def verify(folder: Path) -> None:
    from mm_cb.attacks import verify

    with (
        mock.patch.object(verify, "load_subject", side_effect=_Loaded("here the model would be loaded")),
        suppress(_Loaded),
    ):
        verify.verify_run(folder / "run")


def transferred(folder: Path) -> None:
    from mm_cb.attacks import transfer
    from mm_cb.data.behaviors_file import kept_behaviors

    made = [transfer.read_made(folder / "run") for _ in range(2)]
    with suppress(UserError):
        transfer.told_apart(*made)
    transfer._refuse_other_budget(*made)
    transfer._refuse_other_behaviors(made, asked := kept_behaviors(folder / "run"), folder / "run" / "behaviors.jsonl")
    for behavior in asked:
        made[0].sent(behavior)


def shown_beside(folder: Path) -> None:
    from mm_cb.attacks.run import hijacked_responses
    from mm_cb.benchmarks.over_refusal.beside_attacks import beside, read_attacked
    from mm_cb.benchmarks.over_refusal.data import BenignRequest
    from mm_cb.data.behaviors_file import kept_behaviors

    asked = beside([BenignRequest("a", "b", None, "c")], attacked := read_attacked(folder / "run"))
    attacked.inputs(asked)
    hijacked_responses(folder / "run", kept_behaviors(folder / "run"))


def gathered(folder: Path) -> None:
    from mm_cb.attacks.shards import gather
    from mm_cb.data.behaviors_file import kept_behaviors

    gather(folder / "run", kept_behaviors(folder / "run"))


def gone_on_with(folder: Path) -> None:
    from mm_cb.core.runs import RunDirectory

    held = json.loads((FROZEN / "attack" / "run.json").read_bytes())
    with RunDirectory(folder / "run", "attack", held["recipe"], 0, inputs=held["inputs"]) as run:
        run.finish()


def shown(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from mm_cb.benchmarks.registry import get_benchmark

        subject = json.loads((FROZEN / name / "run.json").read_bytes())["recipe"]["subject"]
        get_benchmark(name).refuse(folder / "run")
        get_benchmark(name).show(folder / "run", subject)

    return read


def battery(folder: Path) -> None:
    from mm_cb.attacks.sanity.run import _show
    from mm_cb.attacks.sanity.stored import refuse_other_checks

    refuse_other_checks(folder / "run", {"epsilon": 32}, _show(folder / "run"))


class _Engine:
    """Answers nothing."""

    def complete(self, requests: Any, max_new_tokens: int) -> Iterable[Any]:
        return ((request.key, "an answer") for request in requests)


def stores(folder: Path) -> None:
    """What a run of a benchmark has answered and judged so far."""
    from mm_cb.benchmarks.llava_wild.judging import JudgingSettings, judge_answers, read_own_rule, review_of
    from mm_cb.benchmarks.llava_wild.questions import read_questions
    from mm_cb.core.progress import Progress
    from mm_cb.inference.generation import Request, complete_all
    from mm_cb.inference.unanswered import unanswered_note

    parts, questions = folder / "run" / "parts", read_questions(str(INPUTS / "wild"))
    requests = [Request(question.id, question.text, ()) for question in questions]
    given = complete_all(_Engine(), requests, parts / "completions.jsonl", 8)
    unanswered_note(parts / "completions.jsonl")
    comparer = mock.Mock(compare=lambda chats: ((key, "8 7") for key in chats))
    plan = JudgingSettings(read_own_rule(INPUTS / "rule.txt"))
    with Progress() as progress:
        found = judge_answers(questions, given, plan, comparer, parts / "judgements.jsonl", progress)
    for question in questions:
        for judgement in found[question.id]:
            review_of(question, judgement)


def attack_state(folder: Path) -> None:
    import torch

    from mm_cb.attacks.checkpoint import Watch

    Watch([1], path=folder / "s.safetensors", seconds=0).resume()
    torch.manual_seed(0)


def model(folder: Path) -> None:
    from mm_cb.models import load_model

    load_model(str(folder / "m"))


def described(folder: Path) -> None:
    """A model's description alone."""
    from mm_cb.core.embedded import is_fiction
    from mm_cb.models.families import load_processor, read_config
    from mm_cb.models.registry import family_of

    is_fiction(folder / "m")
    config = read_config(folder / "m")
    family_of(config, "m")
    load_processor(folder / "m", config)


_BASE: list[Any] = []
"""A whole model, read once."""


def adapter(folder: Path) -> None:
    """An adapter on a model that is whole."""
    from mm_cb.models import load_model, loading

    def base(*told: Any, read: Callable[..., Any] = loading._read) -> Any:
        if not _BASE:
            _BASE.append(read(*told))
        return copy.deepcopy(_BASE[0])

    with mock.patch.object(loading, "_read", base):
        load_model(str(folder / "m"), adapter=str(folder / "a"))


def build(folder: Path) -> None:
    """Build pairs, or go on with them."""
    from mm_cb.core.endpoint import Endpoint
    from mm_cb.data.pairs import PairRecipe, build_pairs

    said = json.dumps({"query": "a square", "completion": "yes"})
    generator = mock.Mock(Endpoint, map=lambda asked, **_: ((key, said) for key, _ in asked))
    recipe = PairRecipe("describer", "generator", "Write of {description}.", "retain")
    build_pairs(
        folder / "images",
        folder / "out",
        recipe,
        describe=lambda missing: ((key, "a square") for key, _ in missing),
        generator=generator,
        behaviors=["how to brew"],
    )


def checkpoint(folder: Path) -> None:
    from mm_cb.training.checkpoints import last_checkpoint

    last_checkpoint(folder, "0" * 64, remove_torn=True)


def pieces(folder: Path) -> None:
    """A finished piece of work of a run, read back."""
    from mm_cb.core.hub import keep_to
    from mm_cb.inference.cached_chunks import once

    with mock.patch.dict("mm_cb.core.hub._commits"):
        keep_to(folder / "run")
    for path in (folder / "run" / "parts").glob("*.json"):
        once(path, list)


def taken_over(folder: Path) -> None:
    """The answers of an earlier run."""
    from mm_cb.benchmarks.llava_wild.answers import take_answers
    from mm_cb.core.runs import RunDirectory

    held = json.loads((FROZEN / "llava-wild" / "run.json").read_bytes())
    with RunDirectory(folder / "new", "eval", held["recipe"], 0) as run:
        take_answers(folder / "run", run, [])


def served(folder: Path) -> None:
    """The body of a server's answer, and the same with an error's status."""
    from mm_cb.core.chat_replies import Trouble, read_answer, read_error

    body = (folder / "a.json").read_bytes()
    said: list[Any] = [read_error(status, body, {}) for status in (301, 400, 401, 429, 500)]
    try:
        plain(read_answer(body))
    except Trouble as trouble:
        said.append(trouble)
    for one in said:
        plain([one.kind, one.reason])
        assert len(one.reason) < 1000


TABLE: dict[str, int] = {}
"""Where the user's file registers."""


def users_code(folder: Path) -> None:
    from mm_cb.core.user_code import registered_by

    registered_by(folder / "mine.py", TABLE, "register_number")


def weights(folder: Path) -> None:
    from mm_cb.models.cache import absent_files, weight_files

    absent_files(folder / "m")
    weight_files(folder / "m")
    model(folder)
