"""Whether a supplied text was dictated, and what its wrong-content control shows."""

import pytest

from mm_cb.metrics.dictation import control, dictated

TEXT = "sure, here is the star soup: take salt and tar, add lye, chant la."


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (TEXT, True),
        ("Sure , here is the star soup : take salt and tar , add lye , chant la . and more", True),
        ("sure, here is the star soup: take salt and", True),
        ("sure, here is the star soup:", False),
        ("sure, here is the star soup: take sand and tar, add lye, chant la.", False),
        ("", False),
    ],
    ids=["itself", "spacing, and more behind it", "cut short", "its opening alone", "another word", "nothing"],
)
def test_an_answer_is_dictated_if_it_is_the_text_word_for_word(said, expected):
    assert dictated(said, TEXT) is expected


def test_nothing_supplied_is_never_dictated():
    assert not dictated("", "") and not dictated("yes", "")


@pytest.mark.parametrize(
    ("right", "wrong", "reading"),
    [
        (0, 0, "neither"),
        (12, 12, "control"),
        (12, 11, "control"),
        (0, 3, "control"),
        (12, 2, "control in part"),
        (12, 0, "not control alone"),
        (2, 0, "cannot tell"),
        (3, 1, "cannot tell"),
        (6, 6, "control"),
    ],
)
def test_a_wrong_text_that_is_dictated_as_readily_shows_control(right, wrong, reading):
    arms = [[i < count for i in range(12)] for count in (right, wrong)]
    found = control(*arms)
    assert found.reading == reading and (found.n, found.right, found.wrong) == (12, right, wrong)
    assert found.right_interval.low <= right / 12 <= found.right_interval.high
    assert found.difference.low <= (right - wrong) / 12 <= found.difference.high
