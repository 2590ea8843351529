"""Imports run one way, and the quick modules stay quick."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm_cb.core.recipe_files import recipe_names

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    *("core", "models", "data", "training", "inference", "metrics", "judges", "attacks", "benchmarks"),
    *("miniature", "report", "real", "demo", "demo_agents", "doctor", "cli"),
)
"""The layers of mm_cb from the bottom to the top: each may import what stands before it, and nothing behind it."""
NAMED = re.compile(r"mm_cb(\.\w+)+(:\w+)?|image_attacks(\.\w+)+")
"""Modules in strings: ``"mm_cb.attacks.typographic:draw"``."""
WITHOUT_IMAGE_ATTACKS = ("core", "metrics", "judges")


def imported_modules(path: Path) -> set[str]:
    names = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            names.add(node.value.partition(":")[0])  # imported by its name, later
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mm_cb":
            names |= {f"mm_cb.{node.attr}"} - {"mm_cb.__version__", "mm_cb.__file__"}
    return names


def layer(dotted: str) -> str:
    """The part of mm_cb that a dotted name belongs to: ``mm_cb.models.chat.x`` -> ``models``."""
    return dotted.partition(".")[2].partition(".")[0]


def test_every_layer_imports_only_what_stands_below_it():
    wrong = []
    for path in sorted((ROOT / "mm_cb").rglob("*.py")):
        own = path.relative_to(ROOT / "mm_cb").with_suffix("").parts[0]
        if own in ("__init__", "__main__"):
            continue
        for name in imported_modules(path):
            if name.startswith("image_attacks") and own in WITHOUT_IMAGE_ATTACKS:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
            if name.startswith("mm_cb.") and layer(name) not in ORDER[: ORDER.index(own) + 1]:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


@pytest.mark.parametrize(
    "line", ["from mm_cb import attack", "import mm_cb\nmm_cb.attack", "from mm_cb.attacks.run import attack"]
)
def test_what_the_package_hands_out_is_an_import_of_its_layer(tmp_path, monkeypatch, line):
    """``from mm_cb import attack`` reaches the attacks, though no layer is called so."""
    (tmp_path / "mm_cb" / "core").mkdir(parents=True)
    (tmp_path / "mm_cb" / "core" / "low.py").write_text(line)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_every_layer_imports_only_what_stands_below_it()


def test_nothing_below_the_guest_names_it():
    below = ORDER[: ORDER.index("miniature")]
    files = (path for name in below for path in (ROOT / "mm_cb" / name).rglob("*.py"))
    assert not [str(path.relative_to(ROOT)) for path in files if "miniature" in path.read_text(encoding="utf-8")]


FAMILIES = "llava|qwen|internvl|gemma|smolvlm|idefics|pixtral|mistral3"
"""Beside the types that the registry names."""
NAMES_FAMILIES = (
    *("mm_cb/models/registry.py", "mm_cb/models/refusals.py"),  # the tables of what is read, and of what is refused
    *("mm_cb/training/recipes/", "mm_cb/miniature/"),  # settings for one model; a model that is shipped
    *("mm_cb/benchmarks/llava_wild/", "mm_cb/data/formats.py"),  # a benchmark, and layouts of rows, of that name
)
NO_FAMILY = (
    r"\b[\w.-]+/[\w.-]+",  # a model on the hub
    *map(re.escape, recipe_names()),
    r"llava[-_]?(?:wild|bench[-\w]*)",  # the benchmark
    r"llava_instruct\w*",  # a data set
    r"\w+DecoderLayer",  # a class of transformers, which several families have
)
"""What has a family's name in it and means no family."""


def test_a_family_is_named_in_its_own_file_alone():
    """Beside it in tables, recipes, known.yaml, scripts, docs and tests."""
    from mm_cb.models.registry import _FAMILIES

    types = (re.sub("[_+]", "[ _+-]?", kind) for kind in _FAMILIES)
    families = re.compile(rf"{FAMILIES}|{'|'.join(types)}", re.IGNORECASE)
    own = {f"{family.__module__.replace('.', '/')}.py" for family in _FAMILIES.values()}
    wrong, named = [], set()
    for path in sorted(path for top in ("mm_cb", "image_attacks") for path in (ROOT / top).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if families.search(re.sub("|".join(NO_FAMILY), "", line, flags=re.IGNORECASE)):
                named.add(name)
                if name not in own and not name.startswith(NAMES_FAMILIES):
                    wrong.append(f"{name}:{number}: {line.strip()}")
    assert not wrong and own <= named


def test_every_part_of_the_package_has_its_place_in_the_order():
    parts = {path.name.removesuffix(".py") for path in (ROOT / "mm_cb").iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__init__", "__main__", "__pycache__", "py.typed"} == set(ORDER)


def test_image_attacks_imports_nothing_of_mm_cb():
    paths = (ROOT / "image_attacks").rglob("*.py")
    assert not [path for path in paths for name in imported_modules(path) if name.split(".")[0] == "mm_cb"]


def test_one_reader_opens_pictures():
    """A second ``Image.open``, or a conversion beside it, is a second rule for what a model is shown."""
    opening = re.compile(r"Image\.open\(|exif_transpose|\.convert\(.RGB|\bfromstream\(|imread\(")
    paths = [path for folder in ("mm_cb", "image_attacks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): opening.findall(path.read_text(encoding="utf-8")) for path in paths}
    assert found.pop("image_attacks/image_files.py").count("Image.open(") == 1
    assert found.pop("image_attacks/transformations.py") == ["Image.open("]  # of a JPEG that it has just made
    assert {name: calls for name, calls in found.items() if calls} == {}


def in_fresh_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


HEAVY = ["torch", "transformers", "peft", "numpy", "datasets", "matplotlib", "scipy"]


@pytest.mark.parametrize("module", ["mm_cb", "mm_cb.cli", "mm_cb.core.runs", "mm_cb.core.progress"])
def test_light_modules_import_nothing_heavy(module):
    assert in_fresh_python(f"import sys, {module}; print([n for n in {HEAVY} if n in sys.modules])") == "[]"


@pytest.mark.parametrize("recipe", ["nope", "nope.yaml", "text.yaml", "empty.yaml", "broken.yaml", "folder.yaml"])
def test_what_is_no_recipe_is_told_before_anything_heavy_is_imported(recipe, tmp_path):
    (tmp_path / "text.yaml").write_text("no fields\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    (tmp_path / "folder.yaml").mkdir()
    typed = ["train", recipe if recipe == "nope" else str(tmp_path / recipe)]
    code = f"import sys; from mm_cb.cli import run; print(run({typed}), [n for n in {HEAVY} if n in sys.modules])"
    assert in_fresh_python(code) == "2 []"


def test_models_import_beside_any_torchvision_without_command_line_packages_and_public_names_when_first_used():
    """What image_attacks needs is tested in tests/image_attacks/test_package.py."""
    code = """
import sys
blocked = dict.fromkeys(("pydantic", "typer", "rich", "datasets"))
sys.modules |= blocked
import mm_cb
print("torch" in sys.modules, hasattr(mm_cb, "nothing"))
from mm_cb.core.torchvision import declare_operators
state = declare_operators()
import transformers
from transformers import LlamaConfig
print(state in {"absent", "compiled", "declared"}, declare_operators() == state)
import mm_cb.models
for name in blocked:
    del sys.modules[name]
from mm_cb import RRConfig, RRTrainer
print({"RRConfig", "RRTrainer"} <= set(dir(mm_cb)), RRTrainer.__name__)
"""
    assert in_fresh_python(code).splitlines() == ["False False", "True True", "True RRTrainer"]


@pytest.mark.parametrize("library", ["torchvision", "transformers.image_processing_backends", "peft"])
def test_a_bare_import_of_mm_cb_mends_torchvision_for_what_is_imported_next(library):
    code = f"""
import sys, mm_cb
print("torch" in sys.modules)
import {library}
from mm_cb.core.torchvision import declare_operators
import importlib.util as u
if u.find_spec("torchvision") is not None:
    import torchvision.ops, torchvision.transforms.v2
print(declare_operators() in {{"absent", "compiled", "declared"}})
"""
    assert in_fresh_python(code).splitlines() == ["False", "True"]


def test_help_is_quick():
    code = "import time, sys; from mm_cb.cli import run; run(['--help']); print('CPU', time.process_time())"
    seconds = min(float(in_fresh_python(code).rpartition("CPU")[2]) for _ in range(3))
    assert seconds < 1.0  # 0.2 on a quiet machine; the promise is 0.5


def test_an_absent_torchvision_is_no_error():
    code = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
from mm_cb.core.torchvision import declare_operators
print(declare_operators())
"""
    assert in_fresh_python(code) == "absent"


def types_named(tree: ast.Module) -> list[str]:
    """Classes of a module, and its names for other types (``Kind = Literal[...]``)."""
    aliases = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] + [
        name.id for name in aliases if isinstance(name, ast.Name) and re.fullmatch(r"[A-Z][a-z]\w*", name.id)
    ]


def test_the_name_of_a_type_stands_for_one_thing_across_both_packages():
    named: dict[str, list[str]] = {}
    for folder in ("mm_cb", "image_attacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in types_named(ast.parse(path.read_text(encoding="utf-8"))):
                named.setdefault(name.lstrip("_"), []).append(str(path.relative_to(ROOT)))
    named.pop("Objective")  # what an attack minimises: from pixels to losses, in the language of either package
    assert {name: places for name, places in named.items() if len(places) > 1} == {}
