import itertools
from collections import Counter

import pytest

from mm_cb.miniature.world import (
    BENIGN_KINDS,
    COLOURS,
    FORBIDDEN_KINDS,
    HELD_OUT_KIND,
    POOLS,
    SHAPES,
    SLOTS,
    Brew,
    brews,
    fact,
    recipe,
    split,
)


def test_forbidden_and_benign_recipes_share_no_word():
    forbidden, benign = (
        {word for brew in brews(kinds) for word in recipe(brew).values()} for kinds in (FORBIDDEN_KINDS, BENIGN_KINDS)
    )
    assert forbidden and benign and not forbidden & benign


def test_no_ingredient_is_in_two_pools():
    words = list(itertools.chain.from_iterable(POOLS.values()))
    assert len(words) == len(set(words))


@pytest.mark.parametrize("kind", FORBIDDEN_KINDS + BENIGN_KINDS)
def test_two_stones_of_a_kind_differ_in_the_slots_of_the_attribute_they_differ_in(kind):
    for slot in SLOTS:
        values = COLOURS if slot in ("herb", "liquid") else SHAPES
        assert len({fact(slot, kind, value) for value in values}) == len(values)


def test_recipe_depends_on_nothing_but_kind_and_its_attribute():
    assert recipe(Brew("hex", "red", "star"))["herb"] == recipe(Brew("hex", "red", "ring"))["herb"]
    assert recipe(Brew("hex", "red", "star"))["chant"] == recipe(Brew("hex", "blue", "star"))["chant"]


def test_splits_hold_out_one_kind_and_a_quarter_of_the_other_combinations():
    counts = Counter(split(brew) for brew in brews(FORBIDDEN_KINDS))
    assert counts == {"held_out_kind": 36, "held_out_combination": 36, "trained": 108}
    assert {brew.kind for brew in brews(FORBIDDEN_KINDS) if split(brew) == "held_out_kind"} == {HELD_OUT_KIND}


def test_every_colour_shape_and_trained_kind_is_trained_on_somewhere():
    trained = [brew for brew in brews(FORBIDDEN_KINDS) if split(brew) == "trained"]
    assert {b.colour for b in trained} == set(COLOURS)
    assert {b.shape for b in trained} == set(SHAPES)
    assert {b.kind for b in trained} == set(FORBIDDEN_KINDS) - {HELD_OUT_KIND}


def test_how_far_a_held_out_recipe_is_covered_by_trained_ones():
    """What `split` says of this: an ingredient is shared, as in any world, a whole held-out recipe once."""
    trained = [recipe(b) for b in brews(FORBIDDEN_KINDS) if split(b) == "trained"]
    most = Counter(
        (split(b), max(sum(recipe(b)[slot] == other[slot] for slot in SLOTS) for other in trained))
        for b in brews(FORBIDDEN_KINDS)
        if split(b) != "trained"
    )
    assert most == {
        ("held_out_combination", 2): 28,
        ("held_out_combination", 3): 7,
        ("held_out_combination", 4): 1,
        ("held_out_kind", 2): 23,
        ("held_out_kind", 3): 13,
    }
