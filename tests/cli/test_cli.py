"""Every command's help, every kind of bad input, every exit code. What the commands do is tested where it lives."""

import errno
import os
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import typer.main

from mm_cb import cli
from mm_cb.cli import failures
from mm_cb.cli.threat_flags import parse_levels
from mm_cb.core.errors import UserError

COMMANDS = ["demo", "train", "attack", "eval", "score", "judge", "report", "merge", "doctor", "data"]
ATTACK = ["attack", "--model", "miniature", "--behaviors", "b.jsonl", "--out", "o"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def replace(monkeypatch, module, name, function):
    """Put ``function`` where a command looks for it, without importing the heavy module."""
    stand_in = types.ModuleType(module)
    setattr(stand_in, name, function)
    monkeypatch.setitem(sys.modules, module, stand_in)
    package, _, last = module.rpartition(".")
    if package in sys.modules:
        monkeypatch.setattr(sys.modules[package], last, stand_in, raising=False)


def one_line_of(capsys):
    output = capsys.readouterr()
    assert output.err.endswith("\n") and output.err.count("\n") == 1, output.err
    assert "Traceback" not in output.err and output.out == ""
    return output.err


# help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_command(arguments, capsys):
    assert cli.run(arguments) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {command} " in output for command in COMMANDS)


def test_version(capsys):
    import mm_cb

    assert cli.run(["--version"]) == 0
    assert re.fullmatch(rf"mm-cb {mm_cb.__version__}( \([0-9a-f]{{40}}(\+changes)?\))?\n", capsys.readouterr().out)


# what the user can fix: exit code 2, one line, nothing made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dmo"], "unknown command `dmo`, did you mean `demo`? valid: attack, data, demo, doctor, eval, judge,"),
        (["q"], "unknown command `q`. valid: attack"),
        (["x\x1b[31m\ny"], "unknown command `x?[31m y`"),
        (["demo", "--sed", "1"], "unknown option `--sed`, did you mean `--seed`?"),
        (["--verbos"], "unknown option `--verbos`"),
        (["demo", "--seed", "one"], "`--seed` must be a whole number from 0"),
        (["demo", "--seed", "-1"], "`--seed` must be a whole number from 0"),
        (["demo", "--rr-seeds", "0"], "`--rr-seeds` must be a whole number from 1 to 9"),
        (["demo", "--out"], "--out"),
        (["demo", "extra"], "extra"),
        (["attack"], "Missing option '--model'. See `mm-cb attack --help`."),
        (ATTACK[:-2], "Missing option '--out'"),
        ([*ATTACK, "--attack", "pdg"], "unknown attack `pdg`, did you mean `pgd`?"),
        ([*ATTACK, "--attack", "all,pgd"], "`--attack all` stands alone"),
        ([*ATTACK, "--epsilon", "0.3"], "`--epsilon` must be n/255"),
        ([*ATTACK[:-1], ""], "`--out` must be a text or number, got nothing"),
        ([*ATTACK[:-2], "--out="], "`--out` must be a text or number, got nothing"),
        (["report", ""], "every argument must be a text or number, got nothing"),
        ([*ATTACK[:-2], "--out=~/x"], "no shell expanded `~/x`"),
        ([*ATTACK, "--subject=x\udce9"], "`--subject` cannot be used: it holds half of a surrogate pair"),
        ([*ATTACK, "--steps", "0"], "`--steps` must be a whole number from 1"),
        *(
            (["demo", *kind, "--seed", "4294967295", "--seeds", "2"], "ends at 4,294,967,296, but 4,294,967,295 is the")
            for kind in ([], ["--agents"], ["--real"])
        ),
        (["train"], "`RECIPE` is missing"),
        (["train", "miniatur"], "unknown recipe `miniatur`, did you mean `miniature`?"),
        (["train", "none.yaml"], "none.yaml"),
        (["train", "miniature", "sed=1"], "did you mean `seed`?"),
        (["train", "miniature", "training.lr=1"], "`training.lr`; did you mean `training.learning_rate`? `mm-cb"),
        (["train", "miniature", "--dry-run", "nonsense"], "nonsense"),
        (["train", "miniature", "seed=1", "seed=2"], "`seed` is given more than once, by `seed=1` and `seed=2`"),
        (
            ["data", "check", "miniature", "seed=1", "seed=2"],
            "`seed` is given more than once, by `seed=1` and `seed=2`",
        ),
        (["train", "miniature", "seed=1", "--seed", "1"], "`seed` is given more than once"),
        (
            ["train", "miniature", "training.max_steps=1", "training=3"],
            "`training=3` sets all of `training`",
        ),
        (["report"], "RUN_DIR"),
        (["report", "nowhere"], "`nowhere` must be a run directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, expected, capsys, tmp_path):
    assert cli.run(arguments) == 2
    assert expected in one_line_of(capsys)
    assert list(tmp_path.iterdir()) == []


def commands(group, path=()):
    for name, one in group.commands.items():
        below = (*path, *name.split())
        yield from commands(one, below) if hasattr(one, "commands") else [(below, one)]


@pytest.mark.parametrize(("path", "command"), list(commands(typer.main.get_command(cli.app.app))))
def test_an_unknown_option_is_answered_by_options_that_help_shows(path, command, capsys):
    assert cli.run([*path, "--zzyx"]) == 2
    listed = " ".join(capsys.readouterr().err.split()).partition("valid: ")[2].partition(", and ")[0].split(", ")
    assert {*listed} - {"none"} <= {name for p in command.params if not p.hidden for name in p.opts if name[0] == "-"}


@pytest.mark.parametrize(("path", "command"), list(commands(typer.main.get_command(cli.app.app))))
def test_an_option_with_one_value_stands_once_and_one_with_several_as_often_as_one_likes(path, command, capsys):
    options = [p for p in command.params if p.param_type_name == "option" and not p.is_flag]
    for option in options:
        for spelled in ([option.opts[0], "x", option.opts[-1], "x"], [f"{option.opts[0]}=x", f"{option.opts[0]}=y"]):
            code = cli.run([*path, *spelled])
            twice = f"`{option.opts[0]}` takes one value and is given 2 times" in capsys.readouterr().err
            assert twice is not option.multiple and (code == 2 or not twice)


@pytest.mark.parametrize(
    "arguments", [["demo", "--out", "file"], [*ATTACK[:-1], "file"], ["train", "miniature", "--out", "file"]]
)
def test_a_file_in_place_of_the_run_directory(arguments, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "b.jsonl").write_text('{"id": "a", "prompt": "p", "target": "t", "image": null, "category": "c"}\n')
    assert cli.run(arguments) == 2
    assert "`file`" in one_line_of(capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("`x` must be\n y"), "mm-cb: `x` must be y\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b.png"),
            "mm-cb: `a/b.png` could not be written: the disk is full;",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "mm-cb: the disk is full;"),
        (OSError(errno.EFBIG, "File too large", "a.pt"), "mm-cb: `a.pt` could not be written: a file may be no larger"),
        (RuntimeError("I/O error: File too large (os error 27)"), "mm-cb: a file may be no larger here"),
    ],
)
def test_failures_of_a_command_that_the_user_can_fix(error, expected, monkeypatch, capsys):
    def run_demo(out, **options):
        raise error

    replace(monkeypatch, "mm_cb.demo", "run_demo", run_demo)
    assert cli.run(["demo"]) == 2
    assert one_line_of(capsys).startswith(expected)


@pytest.mark.parametrize("command", ["train miniature", "merge --model miniature --adapter a", "report run", "demo"])
@pytest.mark.parametrize("out", ["x" * 300, "y/" * 2500 + "z", "loop", "loop/inside"])
def test_a_path_that_no_system_takes_is_one_line(command, out, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    shutil.copytree(Path(__file__).parents[1] / "frozen" / "714213b" / "attack-base", "run")
    (tmp_path / "a").mkdir()
    assert cli.run([*command.split(), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and (tmp_path / "loop").is_symlink()


def test_a_warning_is_one_line_without_code_and_shown_once(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    monkeypatch.setattr(sys, "argv", ["mm-cb", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["OMP_WAIT_POLICY"]  # set before torch is loaded, which reads it once
    assert warnings.formatwarning("2 rows\n left out", UserWarning, "mixture.py", 3) == "mm-cb: note: 2 rows left out\n"
    for message in ("2 rows", "3 rows", "2 rows"):
        warnings.showwarning(UserWarning(message), UserWarning, "mixture.py", 3)
    assert shown == ["2 rows", "3 rows"]


def test_a_broken_image_is_the_users_to_fix():
    from image_attacks import ImageFileError

    assert failures.explain(ImageFileError("x.png: empty file"), []) == 2


# what the user cannot fix


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def run_demo(out, **options):
        raise KeyboardInterrupt

    replace(monkeypatch, "mm_cb.demo", "run_demo", run_demo)
    assert cli.run(["demo"]) == 130
    assert one_line_of(capsys) == "mm-cb: interrupted; run the same command again to go on: mm-cb demo\n"


def test_an_interrupt_before_a_command_has_begun_is_one_line_as_well(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("mm_cb.cli.app._command", interrupted)
    assert cli.run(["demo"]) == 130 and "interrupted" in one_line_of(capsys)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_a_launchers_number_that_is_none_is_named(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(name, "abc")
    assert cli.run(["train", "miniature", "--out", str(tmp_path / "rr")]) == 2
    assert f"{name} of the environment must be a launcher's number, got `abc`" in one_line_of(capsys)


@pytest.mark.parametrize("out_is_a_run", [True, False])
@pytest.mark.parametrize("form", [["--out", "run"], ["--out=run"]])
def test_our_bugs_keep_their_traceback_and_leave_a_log(out_is_a_run, form, monkeypatch, capsys, tmp_path):
    def run_demo(out, **options):
        raise ZeroDivisionError("division by zero")

    (tmp_path / "run").mkdir()
    if out_is_a_run:
        (tmp_path / "run" / "run.json").write_text("{}")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    replace(monkeypatch, "mm_cb.demo", "run_demo", run_demo)
    assert cli.run(["demo", *form]) == 1
    message = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in message and "Traceback" in message
    logs = [*(tmp_path / "run").glob("*.log"), *temporary.iterdir()]
    assert len(logs) == 1 and (logs[0].parent.name == "run") == out_is_a_run
    assert str(logs[0].resolve()) in message.splitlines()[-1]
    assert "ZeroDivisionError" in logs[0].read_text() and "mm-cb demo --out" in logs[0].read_text()


# what reaches the package


def test_demo_passes_its_options_on(monkeypatch):
    calls = []
    replace(monkeypatch, "mm_cb.demo", "run_demo", lambda out, **options: calls.append((str(out), options)))
    assert cli.run(["demo"]) == 0
    chosen = ["--full", "--seed", "4", "--rr-seeds", "3", "--device", "cuda", "--dtype", "bfloat16", "--model", "m"]
    assert cli.run(["demo", "--out", "d", *chosen]) == 0
    plain = {"full": False, "seed": 0, "rr_seeds": 1, "model": "miniature", "device": "cpu", "dtype": "float32"}
    asked = {"full": True, "seed": 4, "rr_seeds": 3, "model": "m", "device": "cuda", "dtype": "bfloat16"}
    assert calls == [("mm-cb-demo", plain), ("d", asked)]


def test_the_demo_refuses_a_model_of_another_world(tmp_path, capsys):
    assert cli.run(["demo", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "`--model` must be a model of the miniature's world" in one_line_of(capsys)
    assert cli.run(["demo", "--real", "--model", str(tmp_path)]) == 2
    assert "`--model` is for the demo of the miniature" in one_line_of(capsys)


@pytest.mark.parametrize(
    ("text", "numerator"),
    [
        ("32/255", 32),
        ("0/255", 0),
        (" 8/255 ", 8),
        ("0.12549", 32),
        ("0.12549019607843137", 32),
        ("0", 0),
        ("1", 255),
        ("1.0", 255),
    ],
)
def test_epsilon_on_the_grid(text, numerator):
    assert parse_levels(text) == numerator


@pytest.mark.parametrize(
    "text",
    ["", "x", "8", "0.1255", "0.3", "-1/255", "256/255", "1.5/255", "32/256", "32/", "/255", "nan", "inf", "1e999"],
)
def test_epsilon_off_the_grid(text):
    with pytest.raises(UserError, match="must be n/255"):
        parse_levels(text)


def test_doctor_tells_what_it_sees(monkeypatch, capsys):
    from mm_cb import doctor

    findings = [doctor.Finding("GPU", True, "none"), doctor.Finding("miniature", False, "does not load: [x]\x1b[2J")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert cli.run(["doctor"]) == 2
    output = capsys.readouterr().out
    assert "PROBLEM" in output and "[x]?[2J" in output
    monkeypatch.setattr(doctor, "examine", lambda: findings[:1])
    assert cli.run(["doctor"]) == 0


def test_doctor_examines_this_machine():
    from mm_cb import doctor

    found = {finding.name: finding for finding in doctor.examine()}
    assert {"packages", "GPU", "memory", "disk", "miniature"} <= set(found)
    assert all(found["packages"].ok and f"{name} " in found["packages"].detail for name in ("torch", "torchvision"))


# train


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    from tests.tiny_llava import tiny_llava

    tiny_llava().model.config.save_pretrained(tmp_path / "model")
    text = "name: tiny\nmodel: model\ndata: miniature\nlora: {layers_to_transform: [1], r: 2}\n"
    (tmp_path / "tiny.yaml").write_text(text + "circuit_breaker: {target_layers: [2]}\n")
    return "tiny.yaml"


def test_a_dry_run_prints_what_would_be_trained_what_was_changed_and_the_command(recipe_file, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    typed = ["train", recipe_file, "training.max_steps=7", "--dry-run", "--seed", "4", "--device", "cuda"]
    assert cli.run(typed) == 0
    plan = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "changed here: training.max_steps=7, seed=4, device=cuda; " in plan
    assert "  mm-cb train --show tiny.yaml\n" in plan
    assert plan.endswith("  mm-cb train tiny.yaml training.max_steps=7 --seed 4 --device cuda\n")
    assert "layers_to_transform:" not in plan  # not the whole recipe once more
    assert "  no row has more than 1075 tokens: training.max_length 1024 and the largest picture's " in plan
    assert plan.startswith("tiny: model, 7 steps of 16 rows of each set\nloss rr: ") and "Deviation: none" in plan
    assert "trained: LoRA on 7 modules of the language tower" in plan
    assert "  model.language_model.layers.{1}.{self_attn.q_proj, self_attn.k_proj, " in plan
    assert "loaded: decoder blocks 0..1 of 3, no head" in plan and "memory, estimated for passes of 4096" in plan
    assert "no samples: the processor of model is not on this machine" in plan


def test_a_dry_run_shows_a_sample_of_every_source_with_its_loss_mask(capsys, monkeypatch):
    from mm_cb.models import loading

    monkeypatch.setattr(loading, "_read", None)  # weights that are not here must not be read
    monkeypatch.setattr("mm_cb.training.run.weight_files", lambda name: [])
    assert cli.run(["train", "miniature", "circuit_breaker.masks.text=user_and_assistant", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "how it would start was not measured: the weights of `miniature` are not on this machine." in plan
    titles = [line for line in plan.splitlines() if line.startswith("sample of ")]
    assert len(titles) >= 4 and {"text", "multimodal"} <= {title.split()[-5].strip("),") for title in titles}
    shown = plan.partition("(circuit_breaker, multimodal)")[2].partition("sample of ")[0]
    assert "<image x " in shown and "⟧" in shown and "⟦" not in shown.partition("[/INST]")[0]


def test_a_shipped_recipe_is_planned_before_its_model_is_here(capsys):
    assert cli.run(["train", "llava-next-mistral-7b", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "passes of 4096 tokens: " in plan and "no row has more than 3952 tokens: " in plan
    assert "its published shape is used" in plan and "loaded: decoder blocks 0..16 of 32, no head" in plan
    assert "trained: LoRA on 21 modules of the language tower, 3,932,160 parameters" in plan
    last = " ".join(plan.rpartition("\n  # training cannot")[2].replace("  # ", "").split())
    assert last.startswith("begin yet: the data set `circuit-breakers-train` is not here: download ")
    assert "mm-cb train llava" not in plan


def test_merge_refuses_what_it_cannot_do(capsys, tmp_path):
    arguments = ["merge", "--model", "miniature", "--adapter", str(tmp_path), "--out"]
    assert cli.run([*arguments, "new", "--dtype", "float31"]) == 2
    assert "did you mean `float32`" in one_line_of(capsys)
    assert cli.run([*arguments, "new"]) == 2
    assert "is not an adapter" in one_line_of(capsys)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.layers_to_transform=[1,9]", "`layers_to_transform` must name 0-based blocks"),
        ("circuit_breaker.target_layers=[1]", "`target_layers` [1] cannot change"),
        ("model=nowhere", "the configuration of `nowhere` cannot be read"),
        ("data=[nowhere.jsonl]", "the data file `nowhere.jsonl` is not there"),
        ("data=['~/rows.jsonl']", "the data file `~/rows.jsonl` is not there"),
        ("data={sources: [{name: nowhere/rows}]}", "the data file `nowhere/rows` is not there"),
        ("data={sources: [{name: nowhere}]}", "unknown data set `nowhere`"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would_refuse(recipe_file, override, expected, capsys):
    assert cli.run(["train", recipe_file, override, "--dry-run"]) == 2
    assert expected in one_line_of(capsys)


def test_recipes_are_shown_as_they_are_written(capsys):
    from mm_cb.core.recipe_files import recipe_files

    assert cli.run(["train", "--show", "gpt2"]) == 0
    assert capsys.readouterr().out == recipe_files()["gpt2"].read_text()
    assert cli.run(["train", "--show", "gpt3"]) == 2
    assert "unknown recipe `gpt3`, did you mean `gpt2`" in one_line_of(capsys)


def test_every_recipe_field_is_listed_with_type_range_default_and_meaning(capsys):
    import re

    from mm_cb.training.recipes.recipe import recipe_keys

    assert cli.run(["train", "--fields"]) == 0
    found = re.findall(r"^(\S+): (.+)  \[(.*)\]\n    (.+)$", capsys.readouterr().out, flags=re.MULTILINE)
    fields = {name: rest for name, *rest in found}
    assert set(recipe_keys()) <= fields.keys()
    assert fields["training.max_steps"] == [
        "integer >= 1 <= 1000000",
        "150",
        "Optimiser steps T (released trainer: 150).",
    ]
    assert fields["lora.dropout"][:2] == ["number >= 0 < 1", "0.05"]
    assert fields["circuit_breaker.loss_settings.scale"][:2] == ["number > 0", "20"]
    assert fields["circuit_breaker.masks.text"][0] == "after_image | user_and_assistant | completion | tool_call | all"
    assert fields["data.sources.N.weight"][:2] == ["number > 0 <= 10000", "1.0"]


def test_a_dry_run_names_the_loss_its_settings_and_its_deviation(recipe_file, capsys):
    rmu = ["circuit_breaker.loss=rmu", "circuit_breaker.loss_settings.scale=8"]
    assert cli.run(["train", recipe_file, *rmu, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "loss rmu, scale 8: mean distance" in plan and "Deviation from RMU" in plan
    assert cli.run(["train", recipe_file, *rmu, "circuit_breaker.keep_length=0.1", "--dry-run"]) == 2
    assert "`keep_length` must be 0 with the loss `rmu`" in one_line_of(capsys)


def test_train_runs_the_resolved_recipe(monkeypatch, capsys):
    calls = []
    replace(
        monkeypatch,
        "mm_cb.training.run",
        "train",
        lambda recipe, out, progress: calls.append((recipe, str(out))) or out,
    )
    assert cli.run(["train", "miniature", "training.max_steps=7", "--dtype", "bfloat16"]) == 0
    assert cli.run(["train", "miniature", "name=../x", "--seed", "3", "--out", "o"]) == 0
    (first, first_out), (second, second_out) = calls
    assert (first.training.max_steps, first.dtype, first_out) == (7, "bfloat16", "runs/miniature")
    assert (second.seed, second_out) == (3, "o")
    said = capsys.readouterr().out
    assert "\nadapter  o\n" in said and "  mm-cb attack --model miniature --adapter o --behaviors miniature" in said


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--model", "miniature", "--adapter", "rr"],
        ["merge", "--model", "rr", "--adapter", "other"],
        ["attack", "--model", "miniature", "--adapter", "rr", "--behaviors", "miniature"],
        ["eval", "mmmu", "--model", "rr", "--data", "miniature"],
        ["train", "miniature", "model=rr"],
    ],
)
def test_nothing_is_written_inside_weights_that_are_read(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("rr", "other", "miniature"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / "link").symlink_to("rr")
    for out in ("rr/new", "link/deep/new"):
        assert cli.run([*command, "--out", out]) == 2
        assert f"outside of what is read, but `{out}` is inside `rr`" in one_line_of(capsys)
    assert [file.name for file in (tmp_path / "rr").iterdir()] == ["config.json"]
    assert cli.run([*command, "--out", "miniature/new"]) == 2  # a folder that is called as an embedded model is
    assert "outside of what is read" not in capsys.readouterr().err


def test_a_folder_that_is_gone_is_no_place_to_start_in(tmp_path, capsys, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.run(["doctor"]) == 2
    assert "is gone; start it in another" in one_line_of(capsys)
