"""What happens to a picture on its way, on the miniature."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from image_attacks import eot, linf_255
from mm_cb.paths import data_path, safe_id
from tests.tiny_llava import picture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("on_the_way", ROOT / "scripts" / "on_the_way.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["on_the_way"] = module
    spec.loader.exec_module(module)
    return module


def squares(pixels):
    return pixels.square().flatten(1).mean(dim=1)


def test_without_ways_the_mean_is_the_objective_itself(script):
    pixels, draws = torch.rand(2, 3, 8, 12), torch.Generator().manual_seed(0)
    for ways in ([], [script.OneOf(())]):
        assert torch.allclose(eot(squares, ways, samples=3, generator=draws)(pixels), squares(pixels))


def test_one_of_several_or_none_is_drawn_and_the_size_stays(script):
    pixels, draws = torch.rand(1, 3, 24, 36), torch.Generator().manual_seed(0)
    views = [script.DRAWN(pixels, draws) for _ in range(24)]
    assert {view.shape for view in views} == {pixels.shape}
    assert 0 < sum(torch.equal(view, pixels) for view in views) < 24
    marks = script.OneOf(tuple(lambda pixels, _, i=i: pixels * 0 + i for i in range(3)))
    drawn = [marks(pixels + 9, draws)[0, 0, 0, 0].item() for _ in range(400)]
    for value in (0, 1, 2):
        assert 60 < drawn.count(value) < 140  # a quarter each, five standard deviations
    assert sum(value >= 9 for value in drawn) > 60


def test_real_ways_keep_the_size_and_change_all_but_the_first(script):
    before = picture(0, (51, 34))
    after = {name: go(before) for name, go in script.WAYS.items()}
    assert {image.size for image in after.values()} == {before.size}
    assert [name for name, image in after.items() if image.tobytes() == before.tobytes()] == ["as it is"]


def test_counts_add_up_and_every_file_is_within_epsilon(script, monkeypatch, tmp_path, capsys):
    lines = data_path("miniature", "behaviors.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    records = [json.loads(line) | {"image": None} for line in lines]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    out = tmp_path / "result.json"
    arguments = ["--behaviors", str(tmp_path / "b.jsonl"), "--out", str(out), "--steps", "3", "--samples", "2"]
    monkeypatch.setattr(sys, "argv", ["on_the_way.py", *arguments, "--epsilon", "8", "--batch", "1"])
    script.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["rows"]) == len(script.WAYS) * 3 and result["of"] == 2 and 0 < result["largest_distance"] <= 8
    assert all(row["n"] == 2 == sum(row["outcomes"].values()) and row["opened"] <= 2 for row in result["rows"])
    made = {}
    for record in records:
        stem = tmp_path / "result" / "images" / safe_id(record["id"])
        for kind in ("plain", "eot"):
            made[record["id"], kind] = (stem / f"pgd-{kind}.png").read_bytes()
            assert 0 < linf_255(stem / f"pgd-{kind}.png", stem.with_suffix(".clean.png")) <= 8
    assert len(set(made.values())) == 4
    assert str(tmp_path) not in json.dumps(result) and "cropped 0.9" in capsys.readouterr().out
