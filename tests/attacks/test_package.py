import doctest
import subprocess
import sys

import image_attacks


def test_docstring_example_runs():
    failed, tried = doctest.testmod(image_attacks)
    assert tried > 5 and failed == 0


def test_import_needs_torch_numpy_and_pillow_only():
    blocked = ("transformers", "torchvision", "mm_cb", "scipy", "pydantic", "typer", "rich", "datasets", "matplotlib")
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import image_attacks\nassert image_attacks.pgd and image_attacks.LlavaNextPreprocessing"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
