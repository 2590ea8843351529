"""The mistakes that scripts/mutate_attacks.py plants can still be planted, and their tests are still there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISTAKES = runpy.run_path(str(ROOT / "scripts" / "mutate_attacks.py"))["MISTAKES"]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_has_one_place_and_a_test_that_may_notice_it(mistake):
    assert (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.right) == 1
    assert mistake.wrong != mistake.right
    file, _, name = mistake.test.partition("::")
    assert re.search(rf"^def {re.escape(name)}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
