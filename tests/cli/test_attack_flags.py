"""`mm-cb attack` and its subcommands: every flag is explained, reaches the configuration, or is refused in one line."""

import itertools
import re
import sys
import types
from pathlib import Path

import pytest
import typer.main

from mm_cb import cli
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.registry import attacks
from mm_cb.attacks.shards import Shard
from mm_cb.attacks.threats import NORMS, Threat
from mm_cb.cli.app import app

ASKED = ["--model", "miniature", "--behaviors", "b.jsonl", "--out", "o"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def called(monkeypatch):
    """What `mm-cb attack` calls, without importing it."""
    calls, stand_in = [], types.ModuleType("mm_cb.attacks.run")
    stand_in.run_attack = lambda *given, shard=None: calls.append((*given, shard))
    monkeypatch.setitem(sys.modules, "mm_cb.attacks.run", stand_in)
    monkeypatch.setattr("mm_cb.cli.attacked.show_attacked", lambda folder, own: None)
    return calls


def refused(arguments, capsys):
    assert cli.run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err


def shown_options(command):
    found = typer.main.get_command(app).commands[command].params
    return [p for p in found if p.param_type_name == "option" and not p.hidden]


def test_the_flags_of_an_attack_stand_under_headings(capsys):
    assert cli.run(["attack", "--help"]) == 0
    shown = capsys.readouterr().out
    headings = {"Model and data:", "What may change:", "Search:", "Of single attacks:", "What is judged:", "Run:"}
    assert headings <= set(shown.splitlines())
    assert "OLD" not in shown and all(norm in shown for norm in NORMS)


def test_every_setting_of_an_attack_has_a_flag():
    """But for what only Python needs: its artefacts, what a file of prompts says, and the parts of a threat."""
    names = {option.name for option in shown_options("attack")}
    fields = set(AttackConfig.__dataclass_fields__) - {"name", "threat", "artefacts", "prompts_each"}
    assert fields <= names and {"norm", "epsilon", "patch_size", "border_width", "attack", "list_"} <= names


def test_the_attacks_are_listed_without_further_options(capsys):
    assert cli.run(["attack", "--list"]) == 0
    listed, _, legend = capsys.readouterr().out.partition("\nGiven: ")
    assert all(f"({given})" in legend for given in ("opening", "supplied text", "form and words"))
    shown = re.split(r"^(?=\w)", listed, flags=re.MULTILINE)[1:]
    assert [rows.split()[0] for rows in shown] == [entry.name for entry in attacks()]
    for rows, entry in zip(shown, attacks(), strict=True):
        line = " ".join(rows.split())
        assert entry.about in line and ("in `all`" in line) == entry.in_all
        assert ("an adapter" in line) == entry.needs_adapter and ("a model that sees" in line) == entry.needs_picture
        assert ("not in the worst case" in line) != entry.in_worst_case


def test_without_flags_an_attack_is_the_default_configuration(called):
    assert cli.run(["attack", *ASKED]) == 0
    source, behaviors, out, names, config, shard = called[0]
    assert (source.model, source.adapter, source.device, source.dtype, source.system) == (
        *("miniature", None, "cpu", "float32"),
        None,
    )
    assert (behaviors, out, names, config, shard) == (Path("b.jsonl"), Path("o"), ["pgd"], AttackConfig(), None)


@pytest.mark.parametrize(("more", "count"), [([], 12), (["--check-convergence", "0"], 0)])
def test_all_attacks_are_checked_for_convergence_unless_told_otherwise(called, more, count):
    Path("b.jsonl").write_text('{"id": "a", "prompt": "p", "target": "t"}\n')
    assert cli.run(["attack", *ASKED, "--attack", "all", *more]) == 0
    assert called[0][4].check_convergence == count


def test_every_flag_reaches_the_configuration(called):
    Path("system.txt").write_text("be brief .")
    flags = ["--adapter", "rr", "--system", "system.txt", "--attack", "pgd_adaptive, apgd", "--norm", "border"]
    flags += ["--border-width", "3", "--epsilon", "64/255", "--steps", "7", "--restarts", "3", "--optimizer", "sign"]
    flags += ["--chain", "--hijacks", "base", "--term-weight", "2", "--balance", "--universal-train", "4"]
    flags += ["--prompts", "prompts.jsonl"]
    flags += ["--max-new-tokens", "9", "--iterates", "2", "--early-stop", "--samples", "1", "--temperature", "0.5"]
    flags += ["--batch", "5", "--shard", "2/3", "--image-backend", "torchvision", "--checkpoint-seconds", "0"]
    flags += ["--draws", "7", "--strength", "0.2", "--vary", "both", "--corpus", "c.txt", "--minibatch", "6"]
    flags += ["--surrogate", "other", "--surrogate-scale", "2", "--eot-samples", "3", "--eot-scale", "0.5"]
    flags += ["--control", "6", "--check-convergence", "13", "--anneal", "steps", "--base", "b", "--probe", "p"]
    flags += ["--thinking"]
    flags += ["--eot-quality", "60", "--candidates", "9", "--seed", "11", "--device", "cuda", "--dtype", "bfloat16"]
    given = {flag for flag in flags if flag.startswith("--")} | {"--model", "--behaviors", "--out"}
    assert given | {"--patch-size", "--list", "--ray"} == {option.opts[-1] for option in shown_options("attack")}
    assert cli.run(["attack", *ASKED, *flags]) == 0
    source, _, _, names, config, shard = called[0]
    assert (source.adapter, source.device, source.dtype, source.system) == ("rr", "cuda", "bfloat16", "be brief .")
    assert (source.base, source.probe, source.thinking) == ("b", "p", True)
    assert names == ["pgd_adaptive", "apgd"] and shard == Shard(2, 3)
    assert config == AttackConfig(
        **{"threat": Threat("border", 64, 3), "steps": 7, "restarts": 3, "seed": 11, "batch": 5, "max_new_tokens": 9},
        **{"optimizer": "sign", "term_weight": 2.0, "balance": True, "iterates": 2, "early_stop": True, "samples": 1},
        **{"temperature": 0.5, "universal_train": 4, "chain": True, "hijacks": Path("base")},
        **{"prompts": Path("prompts.jsonl")},
        **{"image_backend": "torchvision", "checkpoint_seconds": 0.0, "draws": 7, "strength": 0.2, "vary": "both"},
        **{"corpus": Path("c.txt"), "minibatch": 6, "surrogate": Path("other"), "surrogate_scale": 2.0},
        **{"eot_samples": 3, "eot_scale": 0.5, "eot_quality": 60, "candidates": 9},
        **{"control": 6, "check_convergence": 13, "anneal": "steps"},
    )


@pytest.mark.parametrize(
    ("flags", "threat"),
    [
        ([], Threat()),
        (["--epsilon", "8/255"], Threat("linf", 8)),
        (["--norm", "linf", "--epsilon", "0"], Threat("linf", 0)),
        (["--norm", "l2", "--epsilon", "8"], Threat("l2", 255, 8.0)),
        (["--norm", "l2", "--epsilon", "0.5"], Threat("l2", 255, 0.5)),
        (["--norm", "patch", "--patch-size", "24"], Threat("patch", 255, 24)),
        (["--norm", "border", "--border-width", "4", "--epsilon", "32/255"], Threat("border", 32, 4)),
        (["--norm", "blank"], Threat("blank", 255)),
    ],
)
def test_norms(called, flags, threat):
    assert cli.run(["attack", *ASKED, *flags]) == 0
    assert called[0][4].threat == threat


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--norm", "l3"], "`--norm` must be one of linf, l2, patch, border, blank, got `l3`"),
        (["--norm", "patch"], "`--norm patch` needs `--patch-size`"),
        (["--norm", "border", "--patch-size", "3"], "`--norm border` does not read `--patch-size`"),
        (["--border-width", "3"], "`--norm linf` does not read `--border-width`"),
        (["--norm", "patch", "--patch-size", "0"], "`--patch-size` must be a whole number from 1 to"),
        (["--norm", "blank", "--epsilon", "8/255"], "`--norm blank` bounds nothing: leave out `--epsilon`"),
        *(
            (["--norm", "l2", *more], "needs `--epsilon R`")
            for more in ([], ["--epsilon", "8/255"], ["--epsilon", "0"])
        ),
        *((["--norm", "l2", "--epsilon", radius], "needs `--epsilon R`") for radius in ("-1", "inf", "nan")),
        (["--epsilon", "8"], "`--epsilon` must be n/255"),
        (["--attack", "typographic,no_attack", "--epsilon", "8/255"], "`--epsilon` is for an attack that changes"),
        (["--temperature", "2"], "set `--samples` too"),
        (["--samples", "1", "--temperature", "0"], "`--temperature` must be a number from 0.001 to 100"),
        (["--early-stop"], "at least 1 with `--early-stop`"),
        (["--term-weight", "inf"], "`--term-weight` must be a number from 0"),
        (["--optimizer", "lion"], "`optimizer` must be one of adam, sign, momentum"),
        (["--image-backend", "gif"], "`image_backend` must be one of pil, torchvision"),
        (["--checkpoint-seconds", "-1"], "`--checkpoint-seconds` must be a number from 0 to 86,400 (a day)"),
        (["--shard", "3/2"], "`--shard` must be i/n"),
        (["--iteratess", "2"], "did you mean `--iterates`?"),
        (["--attack", "pgd_adaptive"], "give the `--adapter`, or the `--base`"),
        (["--dtype", "float31"], "did you mean `float32`"),
    ],
)
def test_flags_that_cannot_be_are_refused(called, flags, expected, capsys):
    assert expected in refused(["attack", *ASKED, *flags], capsys)
    assert called == []


NO_NUMBERS = ("-1", "nan", "inf", "-inf", "1e400", "9" * 30, "many", "1_0", "0x10", "1,5", "\u0661", "\u00bd", "8/256")


@pytest.mark.parametrize("command", ["attack", "attack check"])
def test_what_is_no_number_or_far_too_large_a_one_is_refused_behind_every_flag_that_takes_one(command, called, capsys):
    numbers = [p.opts[0] for p in shown_options(command) if re.search(r"\[(above )?[\d.,]+ (up )?to |: N from", p.help)]
    assert {"--steps", "--iterates", "--seed"} < {*numbers}
    flags = [*numbers, "--epsilon"]
    for flag, value in itertools.product(flags, NO_NUMBERS):
        said = refused([*command.split(), *ASKED, flag, value], capsys)
        assert f"`{flag}` must be" in said and "got" in said, (flag, value)
    for value in ("1_0/255", "\u0661/255", "nan/255", "1e2/256", "256/255", "-1/255", "1.5/255", "/255", "8/255/1"):
        assert "`--epsilon` must be n/255" in refused([*command.split(), *ASKED, "--epsilon", value], capsys)
    assert called == []


@pytest.mark.parametrize(
    "value", ["0/1", "2/1", "1/0", "-1/2", "1/2/3", "1_0/20", "\u0661/2", "1", "/", "a/b", "1.0/2"]
)
def test_a_shard_is_two_plain_numbers(value, called, capsys):
    assert "`--shard` must be i/n" in refused(["attack", *ASKED, "--shard", value], capsys)


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("attack", ["iterates=4", "chain=true"], "write `--iterates 4 --chain` instead of `iterates=4 chain=true`"),
        ("attack", ["matching_weight=2", "train=3"], "write `--term-weight 2 --universal-train 3`"),
        (
            "attack",
            ["threat_model=patch:24"],
            "write `--norm patch --patch-size 24` instead of `threat_model=patch:24`",
        ),
        ("attack", ["threat_model=border:4"], "write `--norm border --border-width 4`"),
        ("attack", ["threat_model=l2:8", "optimizer=sign"], "write `--norm l2 --epsilon 8 --optimizer sign`"),
        ("attack", ["threat_model=blank"], "write `--norm blank`"),
        ("attack", ["early_stop=false"], "write `nothing`"),
        ("attack", ["iteratess=4"], "unexpected `iteratess=4`: settings are flags, see --help"),
        ("attack", ["extra"], "unexpected `extra`"),
        ("attack", ["behaviors=3"], "unexpected `behaviors=3`"),
        ("attack check", ["batch=3"], "unexpected `batch=3`"),
        ("attack check", ["steps=2", "behaviors=3"], "write `--steps 2 --count 3` instead of `steps=2 behaviors=3`"),
        ("attack check", ["image_backend=torchvision"], "write `--image-backend torchvision`"),
    ],
)
def test_settings_in_their_old_spelling_are_answered_with_the_new_one(called, command, words, expected, capsys):
    assert expected in refused([*command.split(), *ASKED, *words], capsys)
    assert called == [] and list(Path().iterdir()) == []


@pytest.mark.parametrize("command", ["attack", "attack check"])
def test_the_new_spelling_is_one_that_is_taken(command):
    """What an old setting is answered with is a flag of that very command."""
    from mm_cb.cli.attack import _OLD, _OLD_CHECK

    old = {"attack": _OLD, "attack check": _OLD_CHECK}[command]
    flags = {word.rstrip("!") for flag in old.values() for word in flag.split() if word.startswith("--")}
    assert flags <= {opt for option in shown_options(command) for opt in option.opts}


def test_the_flags_default_to_what_python_does():
    from dataclasses import fields

    from mm_cb.attacks.config import AttackConfig

    plain, shown = AttackConfig(), {option.name: option for option in shown_options("attack")}
    same = [field.name for field in fields(AttackConfig) if field.name in shown]
    assert len(same) > 12
    told = {name: shown[name].default for name in same} | {"temperature": plain.temperature}  # None = not given
    told |= {"check_convergence": plain.check_convergence}
    assert told == {name: getattr(plain, name) for name in same}
    assert f"[default: {plain.temperature:g}]" in shown["temperature"].help


def test_a_mistyped_command_behind_attack_is_named(capsys):
    assert "unknown command `attack verfy`, did you mean `attack verify`?" in refused(
        ["attack", "verfy", "run"], capsys
    )


@pytest.mark.parametrize("group", [[], ["data"], ["data", "build"], ["eval"], ["score"]])
def test_a_list_of_commands_is_not_cut(group, capsys):
    assert cli.run([*group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Commands:" in shown and "..." not in shown.partition("Commands:")[2].partition("Example:")[0]


def test_transfer_takes_two_runs(capsys):
    arguments = ["attack", "transfer", "a", "--behaviors", "b.jsonl", "--out", "o"]
    assert "needs two run directories, got 1" in refused(arguments, capsys)


def test_a_check_passes_its_flags_on(monkeypatch):
    calls, stand_in = [], types.ModuleType("mm_cb.attacks.sanity.run")
    stand_in.run_battery = lambda *given, **more: calls.append((*given, more))
    monkeypatch.setitem(sys.modules, "mm_cb.attacks.sanity.run", stand_in)
    assert cli.run(["attack", "check", *ASKED]) == 0
    flags = ["--epsilon", "8/255", "--steps", "3", "--optimizer", "sign", "--iterates", "0", "--count", "2"]
    flags += ["--image-backend", "torchvision", "--seed", "5"]
    assert cli.run(["attack", "check", *ASKED, *flags]) == 0
    assert [call[3:] for call in calls] == [
        (AttackConfig(steps=100, iterates=5), 12, {}),
        (AttackConfig("pgd", Threat(levels=8), 3, 1, 5, optimizer="sign", image_backend="torchvision"), 2, {}),
    ]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--ray", "--shard", "1/2"], "`--ray` and `--shard` divide the same behaviours"),
        (["--ray", "four"], "`--ray` must be a number of processes from 1, or nothing, got `four`"),
        (["--device", "cuda:1", "--ray"], "a GPU of its own"),
        (["--ray"], "pip install -e '.[ray]'"),
    ],
)
def test_ray_that_cannot_be_is_one_line(more, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = ["attack", "--model", "miniature", "--behaviors", "miniature", "--out", str(tmp_path / "out"), *more]
    assert cli.run(asked) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "count"), [(["--ray"], "auto"), (["--ray", "--seed", "3"], "auto"), (["--ray", "2"], "2")]
)
def test_ray_stands_with_a_number_and_without(more, count, called, monkeypatch):
    stand_in = types.ModuleType("mm_cb.attacks.on_ray")
    stand_in.attack_on_ray = lambda *given: called.append(given)
    monkeypatch.setitem(sys.modules, "mm_cb.attacks.on_ray", stand_in)
    assert cli.run(["attack", *ASKED, *more]) == 0
    assert [given[0] for given in called] == [count]
