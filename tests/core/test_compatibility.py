"""What revision 714213b wrote, item by item and field by field."""

import pytest

from mm_cb.core.compatibility import counts_in_worst_case, is_prefilled, with_added_fields

CONTROLS = ("no_attack", "noise", "prefill_only", "prefill", "embedding", "universal")
ATTACKS = ("pgd", "pgd_long", "pgd_adaptive", "pgd_clean_teacher", "pgd_distill", "pgd_fluent", "apgd")


@pytest.mark.parametrize("condition", [*CONTROLS, *ATTACKS])
def test_an_item_without_flags_counts_as_its_condition_did(condition):
    assert counts_in_worst_case({"condition": condition}) is (condition in ATTACKS)
    assert is_prefilled({"condition": condition}) is (condition in ("prefill_only", "prefill"))


@pytest.mark.parametrize("said", [True, False])
def test_an_items_own_flag_decides_whatever_its_condition_is_called(said):
    for condition in ("pgd", "noise", "prefill", "mine"):
        item = {"condition": condition, "worst_case": said, "prefilled": said}
        assert counts_in_worst_case(item) is said and is_prefilled(item) is said


def test_a_recipe_of_before_losses_had_names_is_that_of_rerouting():
    old = {"circuit_breaker": {"alpha": 5.0}, "training": {}, "seed": 0}
    added = {"loss": "rr", "loss_settings": {}, "retain": "l2", "retain_scale": "absolute", "schedule_steps": None}
    added |= {"shared_openings": "rerouted", "answer_ends": "counted", "dial_from": 1.0}
    start = {"start_distance": 0.0, "stop_at_cosine": None, "lr_scheduler_type": "constant", "average_last": 0.0}
    made = with_added_fields("train", old)
    assert made == {"circuit_breaker": {**added, "alpha": 5.0}, "training": start, "seed": 0}
    told = {"circuit_breaker": {"loss": "rmu", "loss_settings": {}, "retain_scale": "relative", "schedule_steps": 9}}
    told["circuit_breaker"] |= {
        "retain": "kl",
        "shared_openings": "left_out",
        "answer_ends": "left_out",
        "dial_from": 0.5,
    }
    assert with_added_fields("train", told) == told
    assert with_added_fields("attack", old) == old
