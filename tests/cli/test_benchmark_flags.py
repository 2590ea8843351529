"""Commands made from benchmarks: every setting is a flag with a line of help, and old spellings are answered."""

import dataclasses
import re

import pytest
import typer.main

from mm_cb import cli
from mm_cb.benchmarks.llava_wild.benchmark import TEMPERATURE, WildSettings
from mm_cb.benchmarks.llava_wild.questions import protocol as wild_protocol
from mm_cb.benchmarks.mmmu.benchmark import MmmuSettings
from mm_cb.benchmarks.mmmu.protocol import protocol as mmmu_protocol
from mm_cb.benchmarks.registry import benchmark_names, get_benchmark
from mm_cb.cli.app import app

COMMANDS = [
    (verb, name)
    for verb in ("eval", "score")
    for name in benchmark_names()
    if verb == "eval" or get_benchmark(name).stored is not None
]


def command(verb, name):
    return typer.main.get_command(app).commands[verb].commands[name]


def one_line_of(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(("verb", "name"), COMMANDS)
def test_every_setting_is_a_flag_and_every_flag_has_a_line_of_help(verb, name, capsys):
    benchmark = get_benchmark(name)
    kind = benchmark.settings if verb == "eval" else benchmark.stored
    options = {option: p for p in command(verb, name).params for option in p.opts if not getattr(p, "hidden", False)}
    for field in dataclasses.fields(kind):
        assert f"--{field.name.replace('_', '-')}" in options
    assert all(p.help and not p.help.endswith("...") for p in options.values())
    assert cli.run([verb, name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example: mm-cb {verb} {name}" in shown and "..." not in shown.replace("FILE...", "")
    assert "[]" not in shown and "\nRun:\n" in shown
    assert all(f" {option} " in re.sub(r"[\n,]", " ", shown) for option in options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mmmu", "subjects=Art,Music", "limit=2"], "write `--subjects Art,Music --limit 2` instead of"),
        (["llava-wild", "judge_runs=3"], "write `--judge-runs 3` instead of `judge_runs=3`"),
        (["over-refusal", "pictures=runs/attack"], "write `--beside runs/attack` instead of `pictures=runs/attack`"),
        (["pope", "nonsense"], "unexpected `nonsense`: settings are flags"),
        (["mmmu"], "`mm-cb eval mmmu` needs `--model`"),
        (["mmmu", "--predictions", "p", "--answers", "a"], "write `mm-cb score mmmu --predictions ... --out DIR`"),
        (["over-refusal", "--model", "miniature"], "benchmark `over-refusal` needs `--data`: benign requests"),
        (["over-refusal", "--model", "miniature", "--data", "x.jsonl", "--judge", "nobody"], "unknown judge `nobody`"),
        (
            ["pope", "--model", "miniature", "--max-new-tokens", "0"],
            "`--max-new-tokens` must be a whole number from 1 to 131,072 (no model answers at greater length), got 0",
        ),
        (["pope", "--model", "m", "--endpoint", "http://h/v1", "--device", "cpu"], "`--device` is for a model in this"),
        (["mmmu", "--model", "m", "--endpoint", "http://h/v1", "--dtype=float32"], "`--dtype` is for a model in this"),
        (["pope", "--model", "miniature", "--subject", "rr"], "`--subject rr` says what this model is not"),
        (
            ["mmmu", "--model", "miniature", "--subjects", "Art, Art"],
            "`--subjects` must name each once, got `Art, ",
        ),
        (["pop"], "unknown benchmark `pop`, did you mean `pope`?"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["eval", *arguments, "--out", "o"]) == 2
    assert expected in one_line_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pope", "--data", "d"], "needs `--answers`"),
        (["pope", "--answers", "a", "x=1"], "unexpected `x=1`"),
        (["over-refusal"], "stored outputs of `over-refusal` cannot be scored"),
    ],
)
def test_what_cannot_be_scored_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["score", *arguments, "--out", "o"]) == 2
    assert expected in one_line_of(capsys)


def test_defaults_are_those_of_the_protocols():
    assert MmmuSettings().max_new_tokens == mmmu_protocol().max_new_tokens
    assert get_benchmark("mmmu").dataset == mmmu_protocol().dataset
    wild = wild_protocol()
    assert WildSettings().max_new_tokens == wild["max_new_tokens"]
    assert WildSettings().judge_temperature == TEMPERATURE == wild["judge_temperature"]
    assert get_benchmark("llava-wild").dataset == wild["dataset"]
