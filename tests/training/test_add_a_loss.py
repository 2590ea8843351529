"""docs/add_a_loss.md: what stands on the page runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from mm_cb import cli
from mm_cb.cli.train import _show_held_out
from mm_cb.training import registry
from mm_cb.training.losses import reroute_loss
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train

PAGE = Path(__file__).parents[2] / "docs" / "add_a_loss.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("page"))
        patched.setattr(registry, "_LOSSES", dict(registry._LOSSES))
        (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
        names: dict = {}
        exec(compile(code, str(PAGE), "exec"), names)
        yield names


def test_the_pages_loss_trains(page):
    trainer = page["trainer"]
    assert trainer.state.global_step == 2
    assert 0.8 < trainer.state.log_history[0]["reroute_loss"] < 0.9  # near the start, which is at cosine 1


def test_with_margin_zero_it_is_the_papers(page):
    adapted, reference = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) % 2
    for count in (None, torch.tensor(20)):
        ours = page["cosine_margin_loss"](adapted, reference, mask, count=count, margin=0.0)
        assert ours.item() == pytest.approx(reroute_loss(adapted, reference, mask, count=count).item())


def test_a_recipe_takes_it_in_python(page):
    (line,) = re.findall(r"`(train\(load_recipe.*?\))`,", PAGE.read_text())
    small = '"training.max_steps=1", "training.batch_size=2", "circuit_breaker.adversary.steps=0"]'
    exec(line.replace('"]', f'", {small}'), {"train": train, "load_recipe": load_recipe})
    assert "Loss `cosine_margin`, margin 0.2: mean ReLU(cos(h, h_base) - margin)" in Path("rr-2/README.md").read_text()


def test_the_command_takes_it_from_a_file(page, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    file = tmp_path / "cosine_margin.py"
    file.write_text(code.partition("settings = {")[0])
    asked = ["--loss", str(file), "circuit_breaker.loss_settings.margin=0.1", "--dry-run"]
    assert cli.run(["train", "miniature", *asked]) == 0
    assert "cosine_margin" in capsys.readouterr().out
    file.write_text("")
    assert cli.run(["train", "miniature", *asked]) == 2
    assert f"`{file}` must call `register_loss`, it registers nothing." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("returned", "came"),
    [
        ("1.5", "a float"),
        ("adapted.mean(-1)", "one of shape"),
        ("reference.mean()", "one without gradient"),
    ],
)
def test_what_is_no_loss_is_the_files_fault_in_one_line(page, tmp_path, capsys, returned, came):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    file = tmp_path / "wrong.py"
    file.write_text(re.sub(r"return \(cosine.*", f"return {returned}", code.partition("settings = {")[0]))
    small = ["training.max_steps=1", "training.batch_size=2", "circuit_breaker.adversary.steps=0"]
    assert cli.run(["train", "miniature", "--loss", str(file), *small, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"the loss `cosine_margin` must return one number as a tensor with gradient, it returned {came}" in said


def test_the_page_is_short():
    assert len(PAGE.read_text().splitlines()) <= 80


def test_a_loss_is_told_with_its_own_value_at_the_first_step(capsys):
    _show_held_out(None, [{"reroute_loss": 7.25, "retain_loss": 0.5}, {"reroute_loss": 3.0, "retain_loss": 0.25}])
    said = " ".join(capsys.readouterr().out.split())
    assert "reroute 3.000 (7.250 at the first step), retain 0.250 (0.500)" in said
