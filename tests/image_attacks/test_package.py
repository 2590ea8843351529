import doctest
import re
import subprocess
import sys
from pathlib import Path

import image_attacks
from image_attacks import linf_255, load_image
from tests.models.tiny import tiny
from tests.tiny_llava import picture


def test_docstring_example_runs():
    failed, tried = doctest.testmod(image_attacks)
    assert tried > 5 and failed == 0


def test_import_needs_torch_numpy_and_pillow_only():
    blocked = ("transformers", "torchvision", "mm_cb", "scipy", "pydantic", "typer", "rich", "datasets", "matplotlib")
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import image_attacks\nassert image_attacks.pgd and image_attacks.ExactPreprocessing"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PAGE = Path(image_attacks.__file__).parents[1] / "docs" / "image_attacks.md"


def test_page_examples_run(tmp_path, monkeypatch, capsys):
    """All are executed as printed, in a fresh folder; those on a model on a tiny random LLaVA-1.5."""
    classifier, vlm, many, several = re.findall(
        r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(classifier, "page classifier", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("8 levels") for line in lines[1:])
    picture(0).save("photo.png")
    model = tiny("llava")
    names = {"model": model.base, "processor": model.processor}
    exec(compile(vlm, "page vision-language model", "exec"), names)
    assert linf_255("photo.png", "hijacked.png") <= 32
    pixels = load_image("photo.png").unsqueeze(0)
    assert names["result"].losses < names["loss"](names["preprocess"](pixels), "what is it")
    exec(compile(many, "page universal", "exec"), names)
    assert linf_255("photo.png", "universal.png") <= 32
    assert names["found"].losses.mean() < names["losses"](pixels).mean()
    exec(compile(several, "page several pictures", "exec"), names)
    assert names["together"].losses < names["both"](names["pair"])
    for one, clean in (("left.png", pixels), ("right.png", pixels.flip(-1))):
        assert 0 < 255 * (load_image(one) - clean[0]).abs().max() < 32.001


def test_page_names_only_what_exists():
    text = PAGE.read_text(encoding="utf-8").partition("## What there is")[2].partition("`stop(")[0]
    names = {name.split(".")[0] for name in re.findall(r"`([A-Za-z_0-9.]+)`", text)} - {"stop"}
    assert len(names) > 25 and names <= set(image_attacks.__all__)
