"""A folder of another kind than is wanted is named for what it is, with what takes it."""

import json

import pytest

from mm_cb import cli
from mm_cb.core.folders import but_is, what_is
from mm_cb.data.rows import open_rows

KINDS = {
    "adapter": ("an adapter, which `--adapter` takes", {"adapter_config.json": {}, "run.json": "train"}),
    "probe": ("a probe, which `--probe` takes", {"probe.json": {}, "run.json": "probe"}),
    "model": ("a model, which `--model` takes", {"config.json": {"model_type": "llava"}}),
    "attacked": ("a run of `mm-cb attack`, for `mm-cb attack verify`", {"run.json": "attack"}),
    "evaluated": ("a run of `mm-cb eval`, for `mm-cb report`", {"run.json": "eval"}),
    "demo": ("a run of `mm-cb demo`, ", {"run.json": "demo"}),
    "begun": ("a run of `mm-cb train`", {"run.json": "train"}),
    "pairs": ("a run of `mm-cb data build pairs`, of which", {"run.json": "data build pairs", "pairs.jsonl": {}}),
}
WANTED = {
    "data": ["data", "check", "{}"],
    "rows": ["train", "miniature", "data=[{}]", "--out", "out"],
    "recipe": ["train", "{}"],
    "looked at": ["doctor", "--model", "{}"],
    "trained": ["train", "miniature", "model={}", "--out", "out"],
    "merged": ["merge", "--model", "{}", "--adapter", "adapter", "--out", "out"],
    "merging": ["merge", "--model", "miniature", "--adapter", "{}", "--out", "out"],
    "behaviors": ["attack", "--model", "miniature", "--behaviors", "{}", "--out", "out"],
    "watched": ["attack", "--model", "miniature", "--behaviors", "miniature", "--probe", "{}", "--out", "out"],
    "verified": ["attack", "verify", "{}"],
    "reported": ["report", "{}"],
    "asked": ["eval", "over-refusal", "--model", "miniature", "--data", "{}", "--out", "out"],
    "transferred": ["attack", "transfer", "{}", "attacked", "--behaviors", "miniature", "--out", "out"],
}
RIGHT = {
    "looked at": ["model"],
    "trained": ["model"],
    "merged": ["model"],
    "merging": ["adapter"],
    "watched": ["probe"],
    "verified": ["attacked"],
    "reported": ["attacked", "evaluated", "demo", "begun", "adapter", "probe", "pairs"],
    "transferred": ["attacked"],
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (_, files) in KINDS.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            run = {"command": content, "recipe": {}, "seed": 0, "inputs": {}, "started": "", "environment": {}}
            (tmp_path / name / file).write_text(json.dumps(run if file == "run.json" else content))
    return tmp_path


def test_rows_beside_a_config_of_their_own_are_no_model(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns, "set": "retain"}) + "\n")
    (tmp_path / "config.json").write_text('{"version": 2}')
    assert what_is(tmp_path) is None and len(open_rows(tmp_path)) == 1


def test_what_a_folder_is(folders):
    for name, (words, _) in KINDS.items():
        assert what_is(folders / name).startswith(words) and but_is(folders / name).startswith(f"; it is {words}")
    (folders / "other").mkdir()
    (folders / "broken").mkdir()
    (folders / "broken" / "run.json").write_text("[" * 10**5)
    for name in ("other", "broken", "nowhere", "a\0b"):
        assert what_is(folders / name) is None and but_is(folders / name) == ""


@pytest.mark.parametrize("wanted", WANTED)
def test_another_kind_is_refused_by_what_it_is(wanted, folders, capsys):
    for name, (words, _) in KINDS.items():
        if name not in RIGHT.get(wanted, ()):
            assert cli.run([part.replace("{}", name) for part in WANTED[wanted]]) == 2
            said = capsys.readouterr().err
            assert words in said, (name, said)
