"""scripts/publish_miniature.py: what it puts into results/, and what of an earlier publication stays."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def publish(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("publish_miniature", ROOT / "scripts" / "publish_miniature.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(run):
        monkeypatch.setattr(sys, "argv", ["publish", str(run), "--out", str(tmp_path / "results")])
        module.main()

    start.kept, start.picture, start.attacked = module.KEPT, module.picture, module.attacked
    return start


def add_breaker(run, kept, said):
    for name in ("rr", "rr-seed1"):
        (run / "adapters" / name / "checkpoints").mkdir(parents=True, exist_ok=True)
        for file in (*kept, "run.json"):
            (run / "adapters" / name / file).write_text(f"{said} {name} {file}")


def test_a_finished_demo_leaves_numbers_picture_and_its_first_breaker_alone(publish, make_run, tmp_path):
    run, results = make_run(n=24), tmp_path / "results"
    for said in ("once", "again"):
        add_breaker(run, publish.kept, said)
        publish(run)
    assert (results / "miniature.json").read_bytes() == (run / "results.json").read_bytes()
    assert (results / "miniature.png").stat().st_size > 1000
    folder = results / "miniature"
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {f"rr/{name}": f"again rr {name}" for name in publish.kept}


@pytest.mark.parametrize("ended", [None, ""])
def test_an_unfinished_run_is_not_published(publish, make_run, tmp_path, ended):
    run = make_run(n=24)
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(content | {"ended": ended}))
    with pytest.raises(SystemExit, match="must be a finished demo or attack"):
        publish(run)
    assert not (tmp_path / "results").exists()


def test_picture_is_a_png_of_moderate_size(publish, make_run, tmp_path):
    publish.picture(make_run(), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.format == "PNG" and 1000 < image.width < 2000
    assert (tmp_path / "picture.png").stat().st_size < 500_000


def test_picture_works_without_a_single_success(publish, make_run, tmp_path):
    def resist(items):
        for item in items:
            if item["metric"] == "compliance":
                item["outcome"] = "refusal"

    publish.picture(make_run(edit=resist), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_an_attack_leaves_numbers_and_who_broke_each_request_first(publish, make_run, tmp_path):
    run = make_run(n=24)
    recorded = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(recorded | {"command": "attack"}))
    publish(run)
    found = json.loads((tmp_path / "results" / "miniature.json").read_text())
    assert found["measurements"] == json.loads((run / "results.json").read_text())["measurements"]
    worst = max(
        (m["counts"]["harmful"], m["subject"])
        for m in found["measurements"]
        if (m["metric"], m["condition"], m["split"]) == ("compliance", "worst_case", "all")
    )
    assert sum(found["first_broken"]["all"].values()) == worst[0] > 0
    assert sum(found["first_broken"]["opening"].values()) <= worst[0]
