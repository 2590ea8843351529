"""What comes along with a model inside the package, asked for by its name."""

import mm_cb.miniature  # noqa: F401  (registers itself)
from mm_cb.core.embedded import embedded, guests, is_fiction


def test_the_guest_is_fiction_and_nobody_else():
    assert is_fiction("miniature")
    assert not is_fiction("org/name") and not is_fiction("./miniature")


def test_a_guest_brings_what_layers_ask_for():
    for guest in guests():
        assert embedded(guest.name) is guest
        assert guest.weights.is_dir() and guest.recipes.is_dir() and guest.card.is_file()
    assert embedded("org/name") is None
