"""Every command's help on a terminal of 80 columns: whole, explained, with an example."""

import itertools
import re
from pathlib import Path

import pytest
import typer.main

from mm_cb import cli
from mm_cb.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


def every_command():
    """Words behind ``mm-cb``, and the command."""

    def below(group, words):
        for name, command in group.commands.items():
            yield [*words, *name.split()], command
            if hasattr(command, "commands"):
                yield from below(command, [*words, name])

    yield from below(typer.main.get_command(app), [])


COMMANDS = list(every_command())


@pytest.fixture(autouse=True)
def eighty(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_help_is_whole_explained_and_has_an_example(words, command, capsys):
    assert cli.run(["help", *words]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    text = shown.partition("\n\n")[2].replace("FILE...", "").replace("RUN_DIR...", "")  # behind the line of usage
    assert "\u2026" not in shown and "..." not in text
    assert "Example: mm-cb " + " ".join(words[:1]) in shown or " ".join(words) == "data build"
    flat = " ".join(shown.split())
    for option in (p for p in command.params if not getattr(p, "hidden", False)):
        assert option.help and " ".join(option.help.split()) in flat, option.name
    lines = [line for line in shown.splitlines() if re.search(r"\w-$", line)]
    assert lines == [], "broken at a hyphen"


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_an_example_on_the_miniature_names_files_that_are_here(words, command):
    typed = (command.epilog or "").split()
    flags = ("--data", "--behaviors", "--images", "--answers")
    named = [value for flag, value in itertools.pairwise(typed) if flag in flags and "--describer" not in typed]
    if "miniature" in typed:
        assert [name for name in named if name != "miniature" and not (ROOT / name).exists()] == []


def test_what_stands_below_a_command_is_shown_with_it(capsys):
    assert cli.run(["attack", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  attack {name} " in shown for name in ("check", "transfer", "verify"))
    assert cli.run(["help"]) == 0
    shown = capsys.readouterr().out
    order = [line.split("  ")[1] for line in shown.partition("Commands:")[2].splitlines() if line[2:3].strip()]
    assert [order[order.index("attack") + i] for i in (1, 2, 3)] == ["attack check", "attack transfer", "attack verify"]
    assert "data build" in order


@pytest.mark.parametrize("words", ["train --list", "attack --list", "eval --list", "judge --list", "data list"])
def test_lists_fit_the_terminal(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cli.run(words.split()) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == [] and "\u2026" not in shown


def listed(words, capsys):
    """Entry → what stands below it, on lines that are not broken."""
    assert cli.run(words) == 0
    found = re.findall(r"^(\S.*)\n((?: {4}.*\n)+)", capsys.readouterr().out.partition("\nnext\n")[0], re.MULTILINE)
    return {name: re.sub(r"\n {6,}", " ", below).split("\n    ") for name, below in found}


@pytest.mark.parametrize("command", ["attack", "eval", "judge"])
def test_a_list_says_of_every_entry_what_it_is_and_what_it_needs(command, capsys):
    from mm_cb.attacks.registry import attacks
    from mm_cb.benchmarks.registry import benchmark_names
    from mm_cb.judges.registry import judge_names

    names = {"attack": [entry.name for entry in attacks()], "eval": benchmark_names(), "judge": judge_names()}
    found = listed([command, "--list"], capsys)
    assert sorted(found) == sorted(names[command])
    for name, lines in found.items():
        about, needs = " ".join(" ".join(lines).split()).split(" needs ", 1)
        assert len(about.split()) > 2 and needs.split(), name
    assert command != "judge" or "--endpoint URL" in " ".join(found["endpoint"])


def test_the_list_of_data_says_of_every_set_what_it_is_its_licence_and_how_it_is_had(capsys, tmp_path, monkeypatch):
    from mm_cb.data.cards import cards

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = listed(["data", "list"], capsys)
    assert [name.partition(" (")[0] for name in found] == list(cards())
    for card, (name, lines) in zip(cards().values(), found.items(), strict=True):
        said = " ".join(" ".join(lines).split())
        assert f"for {card.used_for})" in name and card.summary.split()[0] in said and card.source in said
        assert f"licence: {card.licence}" in said
        if card.used_for == "demo":
            assert "(here" in name and Path(said.rpartition("in the package: ")[2]).is_dir()
        else:
            assert "(not here" in name and "not found; " in said and all(one.split()[0] in said for one in card.how)
            assert card.how, "no command that gets it"
