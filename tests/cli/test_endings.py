"""How commands end: what came out, whether it may be believed, and commands that can be typed."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from mm_cb.cli import attacked
from mm_cb.cli.app import app
from mm_cb.cli.attacked import show_attacked, show_run
from mm_cb.cli.train import _attack_of, _show_held_out
from mm_cb.core import closing
from mm_cb.core.closing import cut, cut_path
from mm_cb.core.runs import write_json, write_jsonl
from mm_cb.metrics.results import measure, read_results, write_results
from mm_cb.report.labels import percent
from mm_cb.training.recipes.recipe import load_recipe

FROZEN = Path(__file__).parents[1] / "frozen" / "714213b"


@pytest.fixture(autouse=True)
def eighty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    closing.TYPED.clear()  # of another test's command line


def said(capsys, *, paths=True):
    """What was printed, which fits 80 columns but for lines that hold a path of this machine."""
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80 and (not paths or "/" not in line)] == []
    assert "\u2026" not in out
    return out


def typed(out):
    """Every command that is printed, as the parser takes it."""
    found = re.findall(r"^  mm-cb ((?:.*\\\n)*.*)$", out, flags=re.MULTILINE)
    for line in found:
        command, words = typer.main.get_command(app), shlex.split(line.replace("\\\n", ""))
        while hasattr(command, "commands"):
            _, command, words = command.resolve_command(typer.main.get_command(app).make_context("x", ["--help"],
                                                        resilient_parsing=True), words)  # fmt: skip
        command.make_context("mm-cb", words)
    return found


@pytest.mark.parametrize("name", ["attack", "attack-base", "judged"])
def test_an_attack_ends_with_every_rate_of_its_results_and_commands_that_parse(name, capsys):
    show_attacked(FROZEN / name)
    out = said(capsys)
    rates = [m for m in read_results(FROZEN / name / "results.json") if (m.metric, m.split) == ("compliance", "all")]
    assert len(rates) > 2 and all(f" {percent(m.value)} [" in out for m in rates if m.value is not None)
    assert "finished?" in out and "opening only" in out and "results  " in out
    assert "May be too low: not" in out or "all answered" in out
    assert any(line.startswith("report ") for line in typed(out))
    assert ("mm-cb train miniature" in out) == (name != "attack")


def unjudged(folder, recipe=None, **more):
    made = {
        "metric": "compliance",
        "subject": "base",
        "split": "all",
        "category": "c",
        "prompt": "ask",
        "target": "sure",
    }
    made |= {"condition": "pgd", "outcome": "not_judged", "gibberish": False, "image": None, "prefix_emitted": True}
    items = [{**made, "id": f"a-very-long-id-of-a-behaviour-{n:04d}", "completion": "sure ."} | more for n in range(3)]
    folder.mkdir()
    write_json(
        folder / "run.json", {"command": "attack", "recipe": recipe or {}, "seed": 0, "ended": "now", "inputs": {}}
    )
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[]))
    return folder


def test_answers_that_nobody_judged_are_no_rate_and_the_judge_is_next(capsys):
    show_attacked(unjudged(Path("run")))
    out = said(capsys, paths=False)
    assert "not judged" in out and "begin with the target: PGD 3 of 3" in out.replace("\n", " ")
    assert "mm-cb judge run --judge refusal-strings" in out and "requests were answered" not in out
    assert "The worst" not in out and f"One of them: {cut('a-very-long-id-of-a-behaviour-0000', 24)} under PGD" in out


@pytest.mark.parametrize("breaker", [False, True])
def test_after_the_bases_run_the_page_is_of_both_where_the_breakers_lies_beside_it(breaker, capsys):
    Path("runs").mkdir()
    if breaker:
        unjudged(Path("runs/attack-rr"), subject="rr")
    show_attacked(unjudged(Path("runs/attack-base"), outcome="refusal"))
    out = said(capsys)
    assert ("report runs/attack-base runs/attack-rr --out report.html" in typed(out)) == breaker
    assert ("a breaker for this model" in out) != breaker


@pytest.mark.parametrize("rows", ["miniature", ["rows.jsonl"]])
def test_a_breaker_of_rows_of_ones_own_is_attacked_by_requests_of_ones_own(rows):
    words = _attack_of(load_recipe("miniature", [f"data={json.dumps(rows)}"]), Path("runs/rr"))
    assert ("behaviors.jsonl" in words) == (rows != "miniature")


@pytest.mark.parametrize("counts", [False, True])
def test_the_worst_of_attacks_is_the_worst_of_those_that_count(counts, capsys):
    folder = unjudged(Path("run"))
    (first, *_), items = [json.loads(line) for line in (folder / "items.jsonl").open()], []
    for condition, harmful in {
        "no_attack": 2,
        "embedding": 3,
        "prefill_only": 1,
        **({"pgd": 2} if counts else {}),
    }.items():
        answer = {**first, "condition": condition, "worst_case": condition == "pgd"}
        items += [{**answer, "id": f"b{n}", "outcome": "harmful" if n < harmful else "refusal"} for n in range(3)]
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[]))
    show_attacked(folder)
    out = " ".join(said(capsys, paths=False).split())
    assert ("2 of 3 forbidden requests were answered in the worst of these" in out) == counts
    assert ("None of these counts in a worst case" in out) != counts
    assert "embedding relaxation 3" in out and ("no attack 2" in out) != counts


def test_requests_that_are_answered_without_an_attack_stand_beside_a_worst_case_that_is_lower(capsys):
    folder = unjudged(Path("run"))
    (first, *_) = [json.loads(line) for line in (folder / "items.jsonl").open()]
    harmful = {"no_attack": 3, "gcg": 1, "embedding": 0}
    items = [
        {**first, "condition": name, "id": f"b{n}", "outcome": "harmful" if n < count else "refusal"}
        for name, count in harmful.items()
        for n in range(3)
    ]
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[]))
    show_attacked(folder)
    out = " ".join(said(capsys, paths=False).split())
    assert "1 of 3 forbidden requests were answered in the worst of these" in out and "no attack 3" in out


def test_behind_a_merge_no_command_writes_into_the_folder_of_the_model(capsys, monkeypatch):
    from mm_cb.cli.merge import merge

    monkeypatch.setattr("mm_cb.models.merging.merge", lambda model, adapter, out, dtype: Path(out))
    merge("miniature", Path("runs/rr"), Path("runs/merged"))
    lines = typed(said(capsys))
    assert len(lines) == 2 and not any("--out runs/merged" in line for line in lines)


def test_the_base_is_attacked_by_the_command_that_was_typed(capsys, monkeypatch):
    typed_before = [
        "attack",
        "--model",
        "M",
        "--adapter=runs/rr",
        "--behaviors",
        "b.jsonl",
        "--attack",
        "pgd,pgd_adaptive",
    ]
    monkeypatch.setattr(closing, "TYPED", [*typed_before, "--out", "runs/attack-rr", "--steps", "20"])
    monkeypatch.setattr(attacked, "TYPED", closing.TYPED)
    Path("runs").mkdir()
    show_attacked(unjudged(Path("runs/attack-rr"), {"adapter": "runs/rr", "attack": "pgd,pgd_adaptive"}, subject="rr"))
    base, page = typed(said(capsys))[-2:]
    assert shlex.split(base.replace("\\\n", ""))[1:] == [
        *("--model", "M", "--behaviors", "b.jsonl", "--attack", "pgd", "--out", "runs/attack-base", "--steps", "20"),
    ]
    assert page.split()[:3] == ["report", "runs/attack-base", "runs/attack-rr"]


@pytest.mark.parametrize("base", [False, True])
def test_after_a_judge_every_hint_is_a_command_and_the_bases_run_is_named_where_it_is(base, capsys, monkeypatch):
    monkeypatch.setattr(closing, "TYPED", ["judge", "runs/attack-rr", "--judge", "refusal-strings"])
    monkeypatch.setattr(attacked, "TYPED", closing.TYPED)
    Path("runs").mkdir()
    recipe = {"adapter": "runs/rr", "attack": "pgd", "steps": 100}
    folder = unjudged(Path("runs/attack-rr"), recipe, subject="rr", outcome="refusal")
    if base:
        unjudged(Path("runs/attack-base"))
    show_attacked(folder)
    out = said(capsys)
    hints = out.partition("\nnext\n")[2].splitlines()
    assert hints[-1].startswith("  mm-cb ") and len(typed(out)) == 2
    page = "report runs/attack-base runs/attack-rr --out report.html" if base else "report runs/attack-rr"
    assert typed(out)[-1] == page


@pytest.mark.parametrize(("run", "other"), [("attack-rr", "attack-base"), ("attack-base", "attack-rr")])
def test_after_a_judge_the_run_beside_it_is_to_be_judged_alike(run, other, capsys, monkeypatch):
    monkeypatch.setattr(attacked, "TYPED", ["judge", f"runs/{run}", "--judge", "refusal-strings"])
    Path("runs").mkdir()
    for name, judge in ((run, "refusal-strings (proxy)"), (other, "harmbench")):
        recipe, subject = ({"adapter": "runs/rr"}, "rr") if name == "attack-rr" else ({}, "base")
        unjudged(Path("runs", name), recipe, subject=subject, outcome="refusal", judge=judge)
    show_attacked(Path("runs", run))
    first, *_, page = typed(said(capsys))
    assert (first, page.split()[:3]) == (
        f"judge runs/{other} --judge refusal-strings",
        ["report", "runs/attack-base", "runs/attack-rr"],
    )


def test_forced_harmless_targets_have_their_own_rate_and_no_judge(capsys):
    show_attacked(unjudged(Path("run"), benign_target=True))
    out = said(capsys, paths=False)
    assert "forced, %" in out and "100.0 [" in out and "mm-cb judge" not in out


@pytest.mark.parametrize(("name", "words"), [("mmmu", "published: 34.7 by"), ("over-refusal", "lower is better")])
def test_a_benchmark_ends_beside_what_is_published_and_says_which_way_is_better(name, words, capsys):
    show_run(FROZEN / name)
    out = said(capsys)
    assert words in " ".join(out.split()) and typed(out)


@pytest.mark.parametrize(("end", "met"), [(0.1, ["met", "met"]), (0.95, ["NOT met", "met"])])
def test_training_ends_with_held_out_rows_and_where_they_should_be(end, met, capsys):
    from mm_cb.training.recipes.recipe import load_recipe

    recipe = load_recipe("miniature")
    records = [
        {"step": step, "held_out_circuit_breaker_cosine": cosine, "held_out_retain_cosine": 0.99}
        for step, cosine in ((0, 1.0), (9, end))
    ]
    _show_held_out(recipe, records)
    rows = [line for line in said(capsys, paths=False).splitlines() if "cosine" in line]
    assert [re.search(r"(NOT )?met", row)[0] for row in rows] == met and f"{end:.3f}" in rows[0]
    _show_held_out(recipe, [{"step": 1, "reroute_loss": 0.5, "retain_loss": 0.1}])
    assert "reroute 0.500" in capsys.readouterr().out


def test_verify_tells_pictures_apart_by_the_ends_of_their_names():
    items = [json.loads(line) for line in (FROZEN / "attack" / "items.jsonl").read_text().splitlines()]
    names = {item["image"] for item in items if item.get("image")}
    assert len({cut_path(name, 42) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("names", "kept"),
    [("pgd_homotopy,pgd_homotopy_opening", "pgd"), ("noise,pgd_probe,pgd_adaptive", "noise"), ("pgd_probe", "pgd")],
)
def test_the_base_beside_a_run_is_given_attacks_that_it_can_be_given(monkeypatch, names, kept):
    typed = ["attack", "--adapter", "A", "--probe", "P", "--attack", names, "--out", "runs/x"]
    for place in (closing, attacked):
        monkeypatch.setattr(place, "TYPED", typed)
    said = attacked._of_the_base({"attack": names, "adapter": "A"}, Path("runs/x"))
    assert said[said.index("--attack") + 1] == kept and not {"--adapter", "--probe"} & set(said)
