"""The shipped recipes as a list: every one in one group, with what it is and needs, on one screen."""

import pytest

from mm_cb import cli
from mm_cb.core.recipe_files import recipe_groups, recipe_model, recipe_names, recipe_purpose, recipe_text


def test_every_recipe_is_in_the_group_of_its_kind():
    found = {group.kind: group.names for group in recipe_groups()}
    assert sorted(name for names in found.values() for name in names) == recipe_names()
    assert found["packaged"] == ["miniature", "miniature-agent", "miniature-paper"]
    assert found["text"] == ["gpt2", "llama-3-8b-instruct", "mistral-7b-instruct"]
    assert found["agents"] == ["llama-3-8b-instruct-agents", "qwen2.5-vl-7b-agents"]


def test_a_group_says_what_all_of_it_is_trained_on_and_what_some_are():
    (text,) = (group for group in recipe_groups() if group.kind == "text")
    assert text.data == ["circuit-breakers-train", "ultrachat_200k"]
    assert text.further == {"llama-3-8b-instruct": ["xstest"], "mistral-7b-instruct": ["xstest"]}


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_list_is_one_screen(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.run(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 44 and max(map(len, lines)) <= int(columns)
    for name in recipe_names():
        assert any(line.split()[:1] in ([name], [f"{name}:"]) for line in lines)


def test_the_list_says_of_every_recipe_what_it_is_and_needs(capsys):
    assert cli.run(["train", "--list"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for group in recipe_groups():
        needs = ", ".join(["the model", "a GPU", *group.data]) if group.data else "nothing"
        assert len(group.about.split()) > 3 and f"{group.kind}: {group.about}; needs {needs}" in listed
        for name in group.names:
            assert (f"{name} {recipe_model(name)}" if group.data else f"{name}: {recipe_purpose(name)}") in listed
            assert len(recipe_purpose(name).split()) > 4


@pytest.mark.parametrize("ending", ["yaml", "yml", "YML", "Yaml"])
def test_a_recipes_file_ends_in_yaml_however_that_is_written(ending, tmp_path):
    path = tmp_path / f"mine.{ending}"
    path.write_text(recipe_text("miniature"))
    assert recipe_text(path) == recipe_text("miniature")
