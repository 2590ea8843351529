"""Every numeric setting of every command has two ends and a reason, as a flag, in a recipe and in Python."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
import typer

from mm_cb import RRConfig, cli
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.threats import Threat
from mm_cb.benchmarks.registry import benchmark_names, get_benchmark
from mm_cb.cli.app import app
from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS
from mm_cb.core.progress import Progress
from mm_cb.core.sizes import GIB, told_size
from mm_cb.data.pairs import PairRecipe
from mm_cb.judges.registry import JudgeOptions
from mm_cb.training.planning.memory import Memory
from mm_cb.training.recipes.config import Recipe
from mm_cb.training.recipes.fields import recipe_fields
from mm_cb.training.recipes.recipe import load_recipe

BEYOND = ("1e30", "1" + "0" * 30, "nan", "-1", "")


def commands(command, path=()):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, one in inner.items():
        yield from commands(one, (*path, *name.split()))


def numeric_flags():
    for path, command in commands(typer.main.get_command(app)):
        needed = [[p.opts[0], "x"] if p.param_type_name == "option" else ["x"] for p in command.params if p.required]
        more = ["--model", "m"] if path[0] == "eval" else ["miniature"] if path[0] == "train" else []
        for option in (p for p in command.params if p.param_type_name == "option"):
            if re.search(r"\[(above )?[\d,.]+ (up )?to [\d,.]+\]", option.help or ""):
                yield [*path, option.opts[0]], [*itertools.chain(*needed), *more]


FLAGS = list(numeric_flags())


def test_flags_were_found():
    names = [flag for flag, _ in FLAGS]
    assert len(names) > 40 and ["attack", "--steps"] in names and ["eval", "pope", "--limit"] in names


def test_no_flag_reads_a_number_without_limits():
    for path, command in commands(typer.main.get_command(app)):
        for option in (p for p in command.params if p.param_type_name == "option"):
            read = option.type_descriptor
            assert read.annotation not in (int, float) or read.parameter_info.parser is not None, (path, option.opts)


@pytest.mark.parametrize(("flag", "needed"), FLAGS, ids=lambda words: " ".join(words[:4]))
def test_a_flag_beyond_its_limits_is_refused_with_the_reason(flag, needed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *command, option = flag
    for text in BEYOND:
        assert cli.run([*command, f"{option}={text}", *needed]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mm-cb: `{option}` must be a ") and "(" in said and said.count("\n") == 1
        assert len(said) < 300 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1_0", "\u0663", "\uff13", "1_0.5"])
def test_numbers_are_ascii_digits(text, capsys):
    for flag in ("--seed", "--temperature"):
        words = ["attack", "--model", "m", "--behaviors", "b", "--out", "o"]
        assert cli.run([*words, flag, text]) == 2 and f"`{flag}` must be a " in capsys.readouterr().err


WRONG = (math.nan, math.inf, -math.inf, -1, True, 10**30, 10**400, 1e30, "3", 2.5)


@pytest.mark.parametrize(
    ("make", "name", "field"),
    [
        *((lambda **more: AttackConfig(**more), f.name, f.name) for f in dataclasses.fields(AttackConfig)),
        (lambda **more: JudgeOptions("x", **more), "batch", "batch"),
        *(
            (lambda **more: PairRecipe("d", "g", "{description}", **more), name, name)
            for name in ("limit", "attempts", "max_tokens", "seed", "temperature")
        ),
        *((lambda **more: Endpoint("http://h/v1", "m", **more), n, n) for n in ("timeout", "retries", "concurrency")),
    ],
)
def test_python_settings_are_refused_alike(make, name, field):
    try:
        default = getattr(make(), field, 1)
    except AttributeError:
        default = 1
    no_numbers = ("threat", "hijacks", "anneal", "corpus", "surrogate", "prompts")
    if isinstance(default, bool | str) or field in no_numbers:
        return
    for value in WRONG:
        if value == 2.5 and isinstance(default, float) or (value == 2.5 and field in ("timeout", "checkpoint_seconds")):
            continue
        with pytest.raises(UserError, match="must be a"):
            make(**{name: value})


@pytest.mark.parametrize("benchmark", benchmark_names())
def test_settings_of_benchmarks_are_refused_alike(benchmark):
    kind = get_benchmark(benchmark).settings
    for field in dataclasses.fields(kind):
        if field.metadata["limit"] is None:
            assert isinstance(field.default, bool | str | tuple | None), field.name
            continue
        for value in (0, math.nan, -1, True, 10**30, 10**400, "3"):
            if value == 0 and field.metadata["limit"].holds(0):
                continue
            with pytest.raises(UserError, match=f"`{field.name}` must be a"):
                kind(**{field.name: value})
    assert kind(limit=None).identity()["limit"] == 0  # as files of earlier runs hold it


RECIPE = [field for field in recipe_fields() if "integer" in field.kind or "number" in field.kind]


@pytest.mark.parametrize("field", RECIPE, ids=lambda field: field.name)
def test_numbers_of_recipes_have_two_ends_and_are_refused_alike(field):
    if field.kind == "key: number":
        return
    assert field.name.startswith("circuit_breaker.loss_settings.") or "<" in field.kind
    if ".N." in field.name:
        return
    shown = "[{}]" if field.kind.startswith("list") else "{}"
    loss = ["circuit_breaker.loss=rmu"] if field.name.startswith("circuit_breaker.loss_settings") else []
    for value in (".nan", ".inf", "-.inf", "-1", "true", "1" + "0" * 30, "1.0e+30", "1" + "0" * 4400):
        with pytest.raises(UserError):
            load_recipe("miniature", [*loss, f"{field.name}={shown.format(value)}"])


def test_a_recipe_says_why():
    with pytest.raises(
        UserError, match=r"`training.max_steps`: a whole number from 1 to 1,000,000 is expected \(the pap"
    ):
        load_recipe("miniature", ["training.max_steps=2000000"])


def test_limits_hold_every_default():
    for field in dataclasses.fields(AttackConfig):
        if field.name in LIMITS and field.default is not None:
            assert LIMITS[field.name].holds(field.default)
    assert Recipe.model_fields  # whose defaults pydantic checks when the shipped recipes are read


@pytest.mark.parametrize("seconds", [10.0, 100_000.0])
def test_more_than_a_day_is_told_once_with_what_would_shorten_it(seconds, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("mm_cb.core.progress.time.monotonic", lambda: now[0])
    with Progress() as progress:
        task = progress.task("attack", 100, shorter="fewer --steps")
        for part in (0.1, 0.2, 0.3):
            now[0] += seconds / 100
            task.advance(0, part=part)
    said = " ".join(capsys.readouterr().out.split())
    days = 99.8 * seconds / 100 / 0.1 / 86_400
    told = f"attack: about {days:,.1f} days left at this speed. Shorter: fewer --steps."
    assert said.count("days left") == (days > 1) and (told in said) is (days > 1)


def test_sizes_are_short_whatever_they_are():
    assert [told_size(GIB * 13.9), told_size(GIB * 2400), told_size(0)] == ["13.9 GiB", "2.3 TiB", "< 0.1 GiB"]
    for power in range(0, 300, 3):
        told = told_size(10.0**power)
        assert len(told) <= 12, told
    assert len(str(Memory(*[1e25] * 6))) < 120 and "e+" not in str(Memory(*[1e15] * 6))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("2", "'2' (str)"),
        (np.bool_(True), "np.True_ (bool)"),
        (np.array("3"), "array('3', dtype='<U1') (ndarray)"),
        (np.array([3, 4]), "array([3, 4]) (ndarray)"),
        (np.float32(3), "np.float32(3.0) (float32)"),
        (3.0, "3.0"),
        (0, "0"),
        (None, "None"),
        (True, "True"),
        ([1], "[1] (list)"),
    ],
)
def test_what_looks_like_a_number_and_is_none_is_named_with_its_type(value, got):
    with pytest.raises(UserError, match=re.escape(f", got {got}.")):
        LIMITS["steps"].number("steps", value)


@pytest.mark.parametrize("made", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda made: made.__name__)
def test_a_number_of_numpy_or_torch_is_pythons_own_from_there_on(made):
    """The same settings, the same run: what a file holds of them, and what decides a random stream."""
    for one in (
        AttackConfig(steps=made(7), seed=made(3), temperature=made(2), threat=Threat("linf", made(9))),
        get_benchmark("pope").settings(limit=made(5)),
        JudgeOptions("call", batch=made(2)),
        RRConfig(output_dir="out", max_steps=made(4), target_layers=[made(1)]),
    ):
        held = getattr(one, "__dict__", None) or one.model_dump()
        for name, value in held.items():
            for part in value if isinstance(value, list | tuple) else [value]:
                assert type(part).__module__ not in ("numpy", "torch"), name
    assert AttackConfig(steps=made(7)) == AttackConfig(steps=7)
    assert type(AttackConfig(temperature=np.float32(0.5)).temperature) is float


def test_what_stands_behind_a_flag_is_shown_as_it_was_typed():
    with pytest.raises(UserError, match=re.escape("got 2x.")):
        LIMITS["steps"].read("--steps", "2x")
