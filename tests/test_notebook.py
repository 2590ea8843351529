"""The notebook's cells run, in order, and make what they promise."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    shown = []
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.version_info, display.display = (9, 0), shown.append  # matplotlib looks at the version
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for number, cell in enumerate(cells):
        cell = cell.replace("max_steps=20", "max_steps=6").replace("steps=60", "steps=3")
        exec(compile(cell, f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "{'circuit_breaker': 4, 'retain': 4}" in said and said.count("of 12 forbidden requests answered") == 2
    assert len(shown) == 3 and all(isinstance(picture, Image.Image) for picture in shown)
    assert (tmp_path / "quickstart-runs" / "report.html").stat().st_size > 10_000


def test_the_package_is_imported_before_what_a_torchvision_that_does_not_fit_would_break():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    first = re.search(r"^(?:from|import) (?:mm_cb|peft|transformers|accelerate)\b.*", code, flags=re.MULTILINE)
    assert first[0].startswith("from mm_cb import RR")  # `import mm_cb` alone loads nothing yet


def test_it_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
