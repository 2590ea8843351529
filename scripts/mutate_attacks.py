"""Does a test notice each of the classic mistakes of an attack?

``python scripts/mutate_attacks.py`` copies the checkout, plants one mistake at a time and runs the one test that must
fail by it; the same tests must pass without. Exit code 1 if a mistake goes unnoticed. About two minutes on a free core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mistake(NamedTuple):
    """A line that is right, what it becomes, and the test that must notice."""

    what: str
    file: str
    right: str
    wrong: str
    test: str


MISTAKES = (
    Mistake(
        "truncation instead of rounding",
        "image_attacks/png.py",
        "return (pixels * 255).round()",
        "return (pixels * 255).floor()",
        "tests/attacks/test_png.py::test_saving_rounds_to_the_nearest_level_and_never_truncates",
    ),
    Mistake(
        "last iterate instead of best",
        "image_attacks/state.py",
        'if which == "best" else',
        'if which == "never" else',
        "tests/attacks/test_pgd.py::test_best_is_never_worse_than_the_start_and_last_is_the_end_of_the_curve",
    ),
    Mistake(
        "sign flipped",
        "image_attacks/threat_models.py",
        "return -gradient.sign()\n\n\n@dataclass(frozen=True)\nclass L2:",
        "return gradient.sign()\n\n\n@dataclass(frozen=True)\nclass L2:",
        "tests/attacks/test_pgd.py::test_one_step_on_a_linear_objective_lowers_it",
    ),
    Mistake(
        "epsilon in normalised units",
        "mm_cb/evaluation/threats.py",
        "ball = Linf(epsilon / 255)",
        "ball = Linf(epsilon / 255 / 0.27)",
        "tests/evaluation/test_hijack.py::test_files_are_in_the_ball_and_hold_what_the_loss_says",
    ),
    Mistake(
        "no clamp to the box",
        "image_attacks/threat_models.py",
        "minimum(maximum(pixels, (clean - self.epsilon).clamp(min=0)), (clean + self.epsilon).clamp(max=1))",
        "minimum(maximum(pixels, clean - self.epsilon), clean + self.epsilon)",
        "tests/attacks/test_threat_models.py::test_projection_lands_in_the_ball_and_in_the_box_and_is_idempotent",
    ),
    Mistake(
        "padding that follows the pixels",
        "image_attacks/preprocessing.py",
        "torch.nn.functional.pad(main, margins)",
        'torch.nn.functional.pad(main, margins, mode="replicate")',
        "tests/attacks/test_preprocessing.py::test_padding_is_black_whatever_the_pixels_and_takes_no_gradient",
    ),
    Mistake(
        "base view placed last",
        "image_attacks/preprocessing.py",
        "torch.cat([base.unsqueeze(1), tiles], dim=1)",
        "torch.cat([tiles, base.unsqueeze(1)], dim=1)",
        "tests/attacks/test_preprocessing.py::test_base_view_comes_first_and_tiles_row_by_row",
    ),
    Mistake(
        "processor rescaling twice",
        "image_attacks/preprocessing.py",
        '["pixel_values"].float()',
        '["pixel_values"].float() / 255',
        "tests/attacks/test_preprocessing.py::test_forward_is_bit_equal_to_the_processor_and_fast",
    ),
    Mistake(
        "KV cache used again",
        "image_attacks/llava_next.py",
        "cache = DynamicCache(config=language.config)",
        'cache = self.__dict__.setdefault("_cache", DynamicCache(config=language.config))',
        "tests/attacks/test_llava_next.py::test_the_loss_at_one_image_is_the_same_however_often_it_is_asked",
    ),
    Mistake(
        "last positions that see what comes",
        "image_attacks/llava_next.py",
        "(places[:, None] >= places)",
        "(places[:, None] >= 0 * places)",
        "tests/attacks/test_llava_next.py::test_rows_of_one_length_without_a_mask_stay_causal",
    ),
    Mistake(
        "earlier positions without gradient",
        "image_attacks/llava_next.py",
        "past_key_values.update(keys, values, block",
        "past_key_values.update(keys.detach(), values.detach(), block",
        "tests/evaluation/test_battery.py::test_the_checked_gradient_is_the_one_that_the_attack_follows",
    ),
    Mistake(
        "restarts that do not turn away",
        "image_attacks/loop.py",
        "state.images[-1]), clean)",
        "state.images[0]), clean)",
        "tests/attacks/test_pgd.py::test_every_later_run_turns_away_from_the_one_right_before_it",
    ),
)


def main() -> int:
    """Run every mistake and print what noticed it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "results", "__pycache__", ".*_cache"))
        if not passes(copy, *(mistake.test for mistake in MISTAKES)):
            sys.stderr.write("the tests fail without any mistake\n")
            return 1
        unnoticed = 0
        for mistake in MISTAKES:
            file, text = copy / mistake.file, (ROOT / mistake.file).read_text(encoding="utf-8")
            assert mistake.right in text, f"{mistake.file} no longer reads {mistake.right!r}"
            file.write_text(text.replace(mistake.right, mistake.wrong, 1), encoding="utf-8")
            seen = not passes(copy, mistake.test)
            file.write_text(text, encoding="utf-8")
            unnoticed += not seen
            sys.stdout.write(f"{'noticed' if seen else 'UNNOTICED':10} {mistake.what:34} {mistake.test}\n")
            sys.stdout.flush()
    return int(unnoticed > 0)


def passes(checkout: Path, *tests: str) -> bool:
    """Whether these tests pass there; a test that cannot run is an error, not a failure."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-2000:]
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
