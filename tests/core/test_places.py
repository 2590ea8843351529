"""Runs keep out of each other, and find again what they were given after a move."""

import os
import shutil

import pytest

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.core.places import enclosing_run, found_again
from mm_cb.core.runs import RunDirectory, hash_inputs
from mm_cb.data.behaviors import write_set


@pytest.fixture
def outer(tmp_path):
    with RunDirectory(tmp_path / "outer", "attack", {}, 0) as run:
        (run.stage("images") / "a.png").write_bytes(b"a")
        run.finish()
    return tmp_path / "outer"


@pytest.mark.parametrize("inside", ["new", "images/deep/new", "../outer/images"])
def test_a_run_inside_another_is_refused_by_name_and_leaves_nothing(outer, inside):
    before = sorted(outer.rglob("*"))
    with pytest.raises(UserError, match="inside the run `.*outer`"):
        RunDirectory(outer / inside, "eval", {}, 0).open()
    assert sorted(outer.rglob("*")) == before


def test_a_link_into_a_run_is_inside_it(outer, tmp_path):
    (tmp_path / "link").symlink_to(outer / "images")
    assert enclosing_run(tmp_path / "link" / "new") == outer.resolve()


def test_other_writers_keep_out_too(outer, capsys):
    for path in (outer / "b" / "behaviors.jsonl", outer / "behaviors.jsonl"):
        with pytest.raises(UserError, match="inside the run"):
            write_set(path, ["{}\n"], {})
    assert cli.run(["merge", "--model", "miniature", "--adapter", "none", "--out", str(outer / "merged")]) == 2
    assert "inside the run" in capsys.readouterr().err and not list(outer.glob(".merged*"))


def test_a_part_of_a_run_that_this_process_writes_lies_inside_it(tmp_path):
    with RunDirectory(tmp_path / "demo", "demo", {}, 0), RunDirectory(tmp_path / "demo" / "rr", "train", {}, 0) as part:
        part.finish()
    with pytest.raises(UserError, match="inside the run"):
        RunDirectory(tmp_path / "demo" / "rr", "train", {}, 0).open()


def test_somebody_elses_run_json_makes_no_run(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "not ours"}')
    with RunDirectory(tmp_path / "new", "eval", {}, 0) as run:
        assert run.path.is_dir()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A run, its adapter and its behaviours below one folder, where the commands were given."""
    home = tmp_path / "home"
    (home / "runs" / "rr").mkdir(parents=True)
    (home / "runs" / "rr" / "adapter_model.safetensors").write_bytes(b"weights")
    (home / "b.jsonl").write_text("{}")
    monkeypatch.chdir(home)
    return home


def started(adapter, behaviors, out="runs/attack", **more):
    files = [behaviors, *sorted(adapter.glob("*.safetensors"))]
    recipe = {"adapter": str(adapter), "behaviors": str(behaviors), "steps": 1, **more}
    return RunDirectory(out, "attack", recipe, 0, inputs=files)


def test_a_moved_run_finds_its_adapter_beside_it_by_content(project, tmp_path, monkeypatch):
    inputs = hash_inputs((project / "runs" / "rr").glob("*"))
    (project / "runs" / "attack").mkdir()
    shutil.move(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run, adapter = tmp_path / "moved" / "runs" / "attack", tmp_path / "moved" / "runs" / "rr"
    for name in ("runs/rr", "/somewhere/else/runs/rr", "../runs/rr", "rr"):
        assert os.path.samefile(found_again(run, name, inputs, "give `--adapter`"), adapter)
    with pytest.raises(UserError, match="neither there nor beside the run; give `--adapter`"):
        found_again(run, "runs/other", inputs, "give `--adapter`")
    (adapter / "adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="holds other weights than it had; give `--adapter`"):
        found_again(run, "runs/rr", inputs, "give `--adapter`")


def test_a_folder_of_the_same_name_with_other_weights_is_not_taken_for_it(project, tmp_path, monkeypatch):
    inputs = hash_inputs((project / "runs" / "rr").glob("*"))
    (tmp_path / "runs" / "rr").mkdir(parents=True)
    (tmp_path / "runs" / "rr" / "adapter_model.safetensors").write_bytes(b"another one")
    monkeypatch.chdir(tmp_path)
    found = found_again(project / "runs" / "attack", "runs/rr", inputs, "")
    assert os.path.samefile(found, project / "runs" / "rr")


def test_a_moved_run_is_gone_on_with_where_its_inputs_lie_now(project, tmp_path, monkeypatch):
    with started(project / "runs" / "rr", project / "b.jsonl") as run:
        run.stage("parts")
    shutil.move(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    adapter, behaviors = (tmp_path / "moved" / part for part in ("runs/rr", "b.jsonl"))
    with started(adapter, behaviors, "moved/runs/attack") as run:
        assert not run.finished
    with pytest.raises(UserError, match=r"different in: recipe\.steps"):
        started(adapter, behaviors, "moved/runs/attack", steps=2).open()
    (adapter / "adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="different in"):
        started(adapter, behaviors, "moved/runs/attack").open()
