"""The table of attacks, their settings, and what files hold of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm_cb.attacks.config import OWN as SINGLE
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import as_artefact, as_recipe, from_recipe
from mm_cb.attacks.entry import resolved
from mm_cb.attacks.refused_settings import refuse_idle, refuse_mismatch
from mm_cb.attacks.registry import attack_entry, attacks, chosen_attacks
from mm_cb.attacks.threats import Threat
from mm_cb.core.errors import UserError

IN_ALL = ["no_attack", "noise", "pgd", "pgd_long", "pgd_adaptive", "pgd_clean_teacher", "pgd_homotopy", "pgd_probe"]
IN_ALL = [
    *IN_ALL[:7],
    "pgd_homotopy_opening",
    "pgd_facts",
    "pgd_form",
    "pgd_form_found",
    *IN_ALL[7:],
    "apgd",
    "typographic",
]
ADAPTIVE = {
    "pgd_form",
    "pgd_form_found",
    "pgd_homotopy",
    "pgd_homotopy_opening",
    "pgd_adaptive",
    "pgd_clean_teacher",
    "pgd_distill",
    "pgd_fluent",
}


def test_all_names_what_the_table_says():
    assert chosen_attacks("all", adapted=True, probed=True) == IN_ALL
    assert chosen_attacks("all", adapted=True) == [name for name in IN_ALL if name != "pgd_probe"]
    assert chosen_attacks("all", adapted=False) == [name for name in IN_ALL if name not in ADAPTIVE | {"pgd_probe"}]
    assert [entry.name for entry in attacks() if entry.in_all] == IN_ALL
    assert {entry.name for entry in attacks() if entry.needs_adapter} == ADAPTIVE


def test_what_counts_in_the_worst_case_is_what_a_user_could_send_and_nobody_prefilled():
    left_out = {"no_attack", "noise", "prefill_only", "prefill", "embedding", "steering"}
    left_out |= {"universal", "universal_corpus"}
    assert {entry.name for entry in attacks() if not entry.in_worst_case} == left_out


@pytest.mark.parametrize("entry", attacks(), ids=lambda entry: entry.name)
def test_every_row_of_the_table_names_what_is_there(entry):
    for reference in (entry.objective, entry.draw, entry.ask):
        assert reference is None or callable(resolved(reference))
    assert entry.about and entry.label and entry == attack_entry(entry.name)
    assert (entry.draw is not None) == (entry.search == "draw")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pgd,pgd_lon", "did you mean `pgd_long`"),
        ("", "unknown attack"),
        ("pgd,pgd", "each attack once"),
        ("pgd_adaptive", "`--adapter`"),
        ("pgd,universal", "alone in its run"),
        ("pgd_probe", "give the `--probe`"),
    ],
)
def test_names_that_cannot_be_attacked_by_are_refused(text, match):
    with pytest.raises(UserError, match=match):
        chosen_attacks(text, adapted=False)
    with pytest.raises(UserError, match="no probe watches"):
        chosen_attacks("embedding", adapted=False, probed=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *(
            ({key: 0}, f"`{key}` must be a whole number from 1 to .*, got 0")
            for key in ("steps", "restarts", "batch", "max_new_tokens")
        ),
        ({"universal_train": -1}, "`universal_train` must be a whole number from 0 to"),
        ({"term_weight": float("inf")}, "from 0 to 1,000,000"),
        ({"early_stop": True}, "`--iterates` must be at least 1 with `--early-stop`"),
        ({"iterates": -1}, "`iterates`"),
        ({"samples": -1}, "`samples`"),
        ({"temperature": 0.0}, "from 0.001 to 100"),
        ({"checkpoint_seconds": -1.0}, "from 0 to 86,400"),
        ({"checkpoint_seconds": float("nan")}, "from 0 to 86,400"),
        ({"optimizer": "lion"}, "one of adam, sign, momentum"),
        ({"image_backend": "gif"}, "one of pil, torchvision"),
        ({"anneal": "linear"}, "`anneal` must be one of none, steps, loss"),
    ],
)
def test_settings_are_checked_when_they_are_made(changes, match):
    with pytest.raises(ValueError, match=match):
        AttackConfig(**changes)
    with pytest.raises(UserError, match="did you mean `pgd`"):
        AttackConfig("pdg")


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("no_attack", 3),
        ("noise", 18),
        ("pgd", 18),
        ("apgd", 18),
        ("typographic", 3),
        ("best_of_n", 300),
        ("embedding", 2),
        ("prefill_only", 3),
    ],
)
def test_k_is_what_is_judged_at_most(name, k):
    """Two runs, two iterates beside the selected picture, two drawn answers beside the greedy one."""
    assert AttackConfig(name, steps=4, restarts=2, iterates=2, samples=2).tries == k


FULL = AttackConfig(
    **{"name": "pgd", "threat": Threat("l2", 255, 8.0), "steps": 7, "restarts": 2, "seed": 3, "batch": 4},
    **{"max_new_tokens": 5, "optimizer": "momentum", "term_weight": 2.0, "balance": True, "iterates": 2},
    **{"early_stop": True, "samples": 1, "temperature": 0.5, "universal_train": 2, "chain": True},
    **{"hijacks": Path("elsewhere"), "image_backend": "torchvision", "anneal": "steps"},
)


OWN = AttackConfig(
    **{"draws": 5, "strength": 0.2, "vary": "both", "corpus": Path("c.txt"), "minibatch": 3, "eot_samples": 2},
    **{"surrogate": Path("elsewhere"), "surrogate_scale": 0.5, "eot_scale": 0.9, "eot_quality": 0, "candidates": 9},
)
"""What single attacks read."""


@pytest.mark.parametrize("config", [OWN, AttackConfig()])
def test_settings_of_single_attacks_are_read_back_from_runs_that_have_them(config):
    names = ["best_of_n", "pgd_transfer", "pgd_eot", "universal_corpus", "gcg"]
    stored = json.loads(json.dumps(as_recipe(config, names)))
    assert from_recipe(stored, config.seed) == {name: replace(config, name=name) for name in names}


@pytest.mark.parametrize("config", [AttackConfig(), FULL, replace(FULL, samples=0, temperature=1.0)])
def test_settings_are_read_back_from_what_files_hold(config):
    stored = json.loads(json.dumps(as_recipe(config, ["pgd", "apgd"])))
    assert from_recipe(stored, config.seed) == {name: replace(config, name=name) for name in ("pgd", "apgd")}
    artefact = json.loads(json.dumps(as_artefact(config, (42, 84))))
    assert artefact["attack"]["canvas"] == [42, 84] and artefact["attack"]["steps"] == config.steps


def test_a_recipe_does_not_say_what_was_not_asked_for():
    options = as_recipe(AttackConfig(), ["pgd"])["options"]
    assert not options.keys() & {"samples", "temperature", "train", "threat_model", *SINGLE}
    assert {key for entry in attacks() for key in entry.reads} == set(SINGLE)
    assert options["matching_weight"] == 1.0  # the name of earlier revisions


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [("control", 0, 3), ("anneal", "none", "steps"), ("eot_quality", 0, 50), ("eot_scale", 1.0, 0.5)],
)
def test_what_is_switched_off_needs_nobody_to_read_it(key, off, on):
    refuse_idle(AttackConfig(**{key: off}), ["typographic"])
    with pytest.raises(UserError, match=f"`--{key.replace('_', '-')}` is for"):
        refuse_idle(AttackConfig(**{key: on}), ["typographic"])


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        ("best_of_n", {"strength": 0}, {"strength": 0.1}),
        ("pgd_eot", {"eot_scale": 1, "eot_quality": 0}, {"eot_scale": 0.9}),
        ("pgd_eot", {"eot_scale": 1, "eot_quality": 0}, {"eot_quality": 100}),
        ("pgd_eot", {"eot_scale": 1, "eot_quality": 0}, {"threat": Threat("patch", size=8)}),
    ],
)
def test_an_attack_without_what_makes_it_one_is_refused_and_others_do_not_mind(name, off, on):
    with pytest.raises(UserError, match=f"`{name}`"):
        refuse_mismatch(AttackConfig(name, **off), ["pgd", name])
    refuse_mismatch(AttackConfig(name, **off | on), [name])
    refuse_mismatch(AttackConfig("pgd", **off), ["pgd"])
