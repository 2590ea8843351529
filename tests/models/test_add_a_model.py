"""docs/add_a_model.md: its example is a family like those that ship."""

import re
from functools import partial
from pathlib import Path

import pytest

from mm_cb.core.errors import UserError
from mm_cb.models import VisionModel, registry
from tests.models import laws
from tests.models.tiny import tiny

PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"


@pytest.fixture(scope="module")
def family():
    """The page's class; the table is put back, as another process would have it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
        space: dict = {}
        exec(compile(code, "internvl.py", "exec"), space)
        yield space["InternVLModel"]


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_the_example_keeps_every_law(family, law, tmp_path):
    assert isinstance(tiny("internvl"), family)
    law(partial(tiny, "internvl"), tmp_path)


def test_without_the_class_the_model_is_refused_and_the_page_named(monkeypatch):
    shipped = {kind: one for kind, one in registry._FAMILIES.items() if kind != "internvl"}
    monkeypatch.setattr(registry, "_FAMILIES", shipped)
    with pytest.raises(UserError, match="internvl; docs/add_a_model.md"):
        tiny("internvl")


def test_a_class_without_a_type_is_refused():
    with pytest.raises(ValueError, match="must name the model types"):
        registry.register_family(type("NamelessModel", (VisionModel,), {}))


def test_the_table_names_members_that_there_are():
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert len(names) > 15 and all(hasattr(VisionModel, name) for name in names)


def test_a_familys_name_stands_in_its_file_and_where_it_is_data():
    root = PAGE.parents[1]
    shipped = {kind: one for kind, one in registry._FAMILIES.items() if one.__module__.startswith("mm_cb.")}
    own = {f"{family.__module__.replace('.', '/')}.py" for family in shipped.values()}
    own |= {f"mm_cb/models/{name}.py" for name in ("registry", "refusals")}
    names = {one for kind, family in shipped.items() for one in (*kind.split("+"), family.__name__)}
    named = re.compile(rf"(?<![\w./-])({'|'.join(names - {'llava'})})(?![\w-])")  # llava: rows of data are so called
    files = {path.relative_to(root).as_posix(): path for path in (root / "mm_cb").rglob("*.py")}
    found = {name for name, path in files.items() if named.search(path.read_text(encoding="utf-8"))}
    assert own <= found
    assert [name for name in found - own if not name.startswith("mm_cb/miniature/")] == []
