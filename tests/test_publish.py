"""What a published run leaves in results/: its breakers, and none of an earlier publication."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "publish_miniature.py"
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "metrics.jsonl")


@pytest.fixture
def publish():
    spec = importlib.util.spec_from_file_location("publish_miniature", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(folder, *names):
    for name in names:
        (folder / name / "checkpoints").mkdir(parents=True)
        for file in (*FILES, "run.json"):
            (folder / name / file).write_text(f"{folder.name} {name} {file}")
    (folder / "notes.txt").write_text("no breaker")
    return folder


def test_the_breakers_of_a_run_are_kept_and_those_of_the_one_before_are_not(publish, tmp_path):
    kept = tmp_path / "kept"
    publish.keep_breakers(trained(tmp_path / "first", "rr", "rr-seed1"), kept)
    publish.keep_breakers(trained(tmp_path / "second", "rr"), kept)
    found = {path.relative_to(kept).as_posix(): path.read_text() for path in kept.rglob("*") if path.is_file()}
    assert found == {f"rr/{name}": f"second rr {name}" for name in FILES}
