"""The scripts that train and attack many breakers, with a stand-in for the commands that they run."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm_cb.metrics.results import measure, write_results
from mm_cb.training.inputs import load_examples
from mm_cb.training.recipes.recipe import load_recipe
from tests.metrics.test_results import outcomes

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
"""Where the modules of the scripts are."""


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules, and the commands that they ran: each leaves what such a run leaves."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("_commands", "ablation", "category_transfer"):
        sys.modules.pop(name, None)
    import _commands
    import ablation
    import category_transfer

    ran, fails = [], []

    def stand_in(command, **_):
        words = command[3:]
        ran.append(words)
        if fails and words[0] in fails:
            return SimpleNamespace(returncode=7)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        if words[0] == "train":
            record = {"step": 1, "held_out_circuit_breaker_cosine": 0.25, "held_out_retain_cosine": 0.96875}
            (out / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        else:
            subject = "rr" if "--adapter" in words else "base"
            said = ["harmful", "refusal", "refusal", "refusal"] if subject == "rr" else ["harmful"] * 4
            write_results(out / "results.json", measure(outcomes(subject, "pgd", said), pairs=[]))
        (out / "run.json").write_text(json.dumps({"ended": "now"}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(_commands.subprocess, "run", stand_in)
    return SimpleNamespace(ran=ran, fails=fails, ablation=ablation, transfer=category_transfer)


def call(monkeypatch, capsys, script, *words):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    script.main()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_the_loss_ablation_runs_each_command_once_and_goes_on_where_it_failed(scripts, monkeypatch, capsys, tmp_path):
    words = ["miniature", "training.max_steps=2", "--behaviors", "f.jsonl", "--losses", "rr,rmu", "--seeds", "0,1"]
    words += ["--out", tmp_path]
    scripts.fails.append("attack")
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, capsys, scripts.ablation, *words)
    assert ended.value.code == 7 and [ran[0] for ran in scripts.ran] == ["train", "attack"]
    scripts.fails.clear()
    lines = call(monkeypatch, capsys, scripts.ablation, *words)
    trained = [ran for ran in scripts.ran if ran[0] == "train"]
    assert len(trained) == 4 and len({ran[ran.index("--out") + 1] for ran in trained}) == 4
    for ran in trained:
        assert "circuit_breaker.adversary.steps=0" in ran and "training.max_steps=2" in ran
    assert any("circuit_breaker.loss=rmu" in ran and "seed=1" in ran for ran in trained)
    assert len(lines) == 2 + 4
    assert lines[2] == "| rr | 0 | 0.250 | 0.969 | 25.0 [4.6, 69.9] n=4 | - |"
    before = len(scripts.ran)
    assert call(monkeypatch, capsys, scripts.ablation, *words) == lines and len(scripts.ran) == before


def test_the_data_ablation_leaves_out_what_the_sources_have(scripts, monkeypatch, capsys, tmp_path):
    words = ["llama-3-8b-instruct", "--data", "--behaviors", "f.jsonl", "--seeds", "3", "--out", tmp_path]
    lines = call(monkeypatch, capsys, scripts.ablation, *words)
    assert [line.split(" | ")[0] for line in lines] == [
        *("| rows", "| ---", "| as they are", "| no request removed", "| no refusals")
    ]
    whole, kept, complying = (
        load_recipe("llama-3-8b-instruct", [word for word in ran[2:] if "=" in word and word[0] != "/"]).data.sources
        for ran in scripts.ran
        if ran[0] == "train"
    )
    assert [one.remove_request for one in whole] == [0.5, 0, 0] and [one.refusals for one in whole] == [0, 0, 1]
    assert not any(one.remove_request for one in kept) and kept[2].refusals
    assert complying[0].remove_request and not any(one.refusals for one in complying)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, capsys, scripts.ablation, "miniature", "--data", *words[2:])
    assert ended.value.code == 2 and "sources" in capsys.readouterr().err


def test_the_transfer_matrix_has_a_row_for_the_base_and_each_category(scripts, monkeypatch, capsys, tmp_path):
    for name in ("a", "b", "a-asked", "b-asked", "kept"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    named = [f"{n}={tmp_path / f'{n}.jsonl'},{tmp_path / f'{n}-asked.jsonl'}" for n in ("a", "b")]
    words = ["mine.yaml", "--retain", tmp_path / "kept.jsonl", "--category", named[0], "--category", named[1]]
    monkeypatch.setattr(scripts.transfer, "load_recipe", lambda *_: SimpleNamespace(model="m"))
    lines = call(monkeypatch, capsys, scripts.transfer, *words, "--out", tmp_path / "out")
    assert lines[0] == "| trained on | a | b |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| none", "| a", "| b"]
    assert "100.0 [51.0, 100.0] n=4" in lines[2] and lines[3].count("25.0 [4.6, 69.9] n=4") == 2
    trained = [ran for ran in scripts.ran if ran[0] == "train"]
    for name, ran in zip("ab", trained, strict=True):
        assert f"data=[{tmp_path / f'{name}.jsonl'}, {tmp_path / 'kept.jsonl'}]" in ran
    assert len(scripts.ran) == 2 + 6
    for bad in (["--category", "a"], ["--category", named[0]], []):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, capsys, scripts.transfer, *words[:3], *bad, "--out", tmp_path / "out")
        assert ended.value.code == 2


def test_the_miniatures_rows_are_parted_by_what_their_answers_say(scripts, monkeypatch, tmp_path):
    """Those without a request, which no file may hold, are left out; training takes the rest."""
    from mm_cb.miniature import data

    monkeypatch.setattr(data, "TRAINING_ROWS", 40)
    monkeypatch.setattr(scripts.transfer, "SIZE", 20)
    retain, categories = scripts.transfer.miniature(tmp_path)
    ids = [json.loads(line)["id"] for _, rows, _ in categories for line in rows.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 40  # each once
    for kind, _, asked in categories:
        brews = [json.loads(line)["brew"][0] for line in asked.read_text().splitlines()]
        assert brews and set(brews) == {kind}
    assert len(retain.read_text().splitlines()) == 80
    for _, rows, _ in categories:
        recipe = load_recipe("miniature-paper", [f"data=[{rows}, {retain}]"])
        assert {example.set for example in load_examples(recipe)} == {"circuit_breaker", "retain"}


@pytest.fixture
def measured_before(tmp_path):
    """Folders of a breaker that is done, and of none."""
    told = {"seed": 0, "threads": 1, "fields": ["circuit_breaker.loss=rr"], "requests": "demo", "data": "whole"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "breakers.jsonl").write_text(json.dumps({**told, "steps": "pgd=1"}) + "\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "losses.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("benchmarks/spread.py --out out --attack pgd=1 circuit_breaker.loss=rand_p", "holds measurements with fields"),
        (
            "benchmarks/spread.py --out out --attack pgd=2 circuit_breaker.loss=rr",
            "holds measurements with steps pgd=1",
        ),
        ("benchmarks/spread.py --out new --attack nosuch=1", "unknown attack `nosuch`"),
        ("benchmarks/spread.py --out new --attack pgd", "must be NAME=STEPS"),
        ("benchmarks/spread.py --out new --seeds x", "must be whole numbers"),
        ("benchmarks/spread.py --out new foo.bar=1", "unknown recipe key `foo.bar`"),
        ("benchmarks/real_losses.py nowhere --out new --losses rx", "unknown loss `rx`"),
        ("publish_ablations.py --losses nowhere --out results", "must hold what spread.py made of every loss"),
        ("publish_ablations.py --real nowhere --out results", "--real must be"),
        ("publish_ablations.py --transfer nowhere --out results", "--transfer must be"),
        ("ablation.py miniature --behaviors f --out new --losses rx", "unknown loss `rx`"),
        ("ablation.py nosuch --behaviors f --out new", "nosuch"),
    ],
)
def test_a_script_says_in_one_line_what_it_cannot_do_and_leaves_all_as_it_was(
    measured_before, monkeypatch, capsys, words, line
):
    monkeypatch.chdir(measured_before)
    before = {file: file.read_text() for file in measured_before.rglob("*") if file.is_file()}
    script, *given = words.split()
    monkeypatch.setattr(sys, "argv", [script, *given])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str((SCRIPTS / script).parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(told) == 1 and line in told[0]
    assert {file: file.read_text() for file in measured_before.rglob("*") if file.is_file()} == before
