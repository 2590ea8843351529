"""Degenerate completions: nothing, one thing over and over, characters drawn blindly; ordinary text stays."""

import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_cb.metrics.degenerate import degenerate, is_noise

ESSAY = (
    "Roses want sun, water and a little patience. Plant them in spring, half a metre apart, in soil that drains well; "
    "water the roots and never the leaves, and cut back what has faded so that new buds can come before autumn."
)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u200b\u200b", " \ufeff\u2060\n"])
def test_nothing(text):
    assert degenerate(text) == "empty"


@pytest.mark.parametrize(
    "text",
    ["the the the the the the the", "a" * 50, "no, no, " * 20, ESSAY[:40] + " and so on" * 20, "1 2 3 4 " * 30],
)
def test_loops(text):
    assert degenerate(text) == "repetition"


@pytest.mark.parametrize("text", [ESSAY, "B", "No.", "ha ha ha", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "yes " * 3, "-" * 12])
def test_ordinary_answers(text):
    assert degenerate(text) is None


@given(st.text(alphabet="abcdefgh ", min_size=1, max_size=12).filter(str.strip), st.integers(20, 60))
def test_any_piece_repeated_often_enough_is_found(piece, times):
    assert degenerate(piece * times) == "repetition"


@settings(max_examples=50)
@given(st.text(max_size=1000))
def test_any_text_has_an_answer(text):
    assert degenerate(text) in (None, "empty", "repetition", "noise")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [200, 400, 1500, 10_000])
def test_blindly_drawn_characters_are_noise(seed, length):
    assert degenerate("".join(random.Random(seed).choices(string.printable, k=length))) == "noise"


@pytest.mark.parametrize("alphabet", [string.ascii_uppercase, string.ascii_lowercase + "     ", string.ascii_letters])
@pytest.mark.parametrize(("length", "share"), [(80, 0.6), (300, 0.95)])
def test_most_blindly_drawn_letters_are_noise(length, share, alphabet):
    rng = random.Random(0)
    draws = ["".join(rng.choices(alphabet + " ", k=length)) for _ in range(300)]
    assert sum(degenerate(draw) == "noise" for draw in draws) >= share * len(draws)


def test_capitals_do_not_make_a_text_noise():
    assert not is_noise(ESSAY.upper()) and not is_noise(ESSAY)


def test_no_page_and_no_program_of_ours_is_noise():
    """Prose, Markdown tables and code, in pieces as long as an answer; shell code comes closest."""
    root = Path(__file__).parents[2]
    files = [file for kind in ("*.md", "*/*.md", "*/*.py", "*/*/*.py", "*/*.sh") for file in root.glob(kind)]
    pieces = [
        text[i : i + 400] for text in (f.read_text(encoding="utf-8") for f in files) for i in range(0, len(text), 400)
    ]
    assert len(pieces) > 1000
    assert [piece for piece in pieces if is_noise(piece)] == []


def test_other_scripts_are_not_noise():
    rng = random.Random(0)
    for first, last in ((0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x3041, 0x30FF), (0x0905, 0x0939), (0x0410, 0x044F)):
        assert not is_noise("".join(chr(rng.randint(first, last)) for _ in range(600)))


@pytest.mark.parametrize(
    "text",
    [
        "The points are A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y and Z; a line is AB.",
        "图中的品牌有 Zyx, Quip, Vowk, Jabs, Frumpt, Glyd, Hexn, Blick, Twov, Marq, Jinx, Dupz, Fogh, Kwyc 和 Vest，"
        "都在左边的货架上。",
    ],
)
def test_letters_in_lists_and_in_other_scripts_are_no_noise(text):
    assert degenerate(text) is None


@pytest.mark.parametrize(("times", "expected"), [(14, None), (18, None), (24, "repetition"), (40, "repetition")])
def test_a_loop_is_a_repetition_from_half_of_the_text_on(times, expected):
    told = "one two three four five six seven eight nine ten eleven then "
    assert degenerate(told + "na " * times) == expected
