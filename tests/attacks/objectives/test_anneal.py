"""The adapter's scale on the way of an attack, for whatever it minimises."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_cb.attacks.config import ANNEAL, AttackConfig
from mm_cb.attacks.objectives.anneal import ALLOWED, FORCED, RAISED, Annealed, scale_after
from mm_cb.attacks.registry import attack_entry, attacks
from mm_cb.attacks.saved import to_pixels
from mm_cb.attacks.search import OPTIMIZERS, make_objective, search
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.inference.subjects import Subject
from mm_cb.models.merging import merge
from tests.attacks.helpers import attack, first_behaviors, save_adapter
from tests.attacks.objectives.test_adaptive import BEHAVIORS, PICTURES, RESPONSES
from tests.tiny_llava import adapted_llava

FORMS = ("pgd_form", "pgd_form_found")  # which need behaviours of their own: test_form.py, test_found_form.py
KNOWING = [entry.name for entry in attacks() if entry.can_anneal and not (entry.universal or entry.needs_probe)]
KNOWING = [name for name in KNOWING if name not in FORMS]
NAMES = [entry.name for entry in attacks()]
PIXELS = torch.stack([to_pixels(p) for p in PICTURES])


@pytest.fixture(scope="module")
def subject():
    return Subject("rr", adapted_llava(), adapted=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A behaviours file of two, an adapter, and the checkpoint it is merged into."""
    folder = tmp_path_factory.mktemp("anneal")
    adapter = save_adapter(folder / "adapter", 1)
    return first_behaviors(folder, 2), str(adapter), str(merge("miniature", adapter, folder / "merged"))


def scales(by, losses, steps=100):
    """The scale at every step of a run whose rows have these losses all along."""
    found = [torch.zeros(len(losses))]
    for step in range(1, steps + 1):
        found.append(scale_after(by, found[-1], torch.tensor(losses), step, steps))
    return torch.stack(found)


@pytest.mark.parametrize("by", ANNEAL[1:])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_scale_rises_from_nought_to_one(by, steps):
    found = scales(by, [0.0, 9.0, ALLOWED], steps)
    assert bool((found[0] == 0).all()) and bool((found[-1] == 1).all())
    assert bool((found.diff(dim=0) >= 0).all()) and bool(((found >= 0) & (found <= 1)).all())


def test_the_row_says_how_unless_the_flag_does_and_only_pgd_reads_it():
    given = {
        (name, anneal): AttackConfig(name, anneal=anneal).annealing for name in NAMES for anneal in (None, *ANNEAL)
    }
    assert {name for name in NAMES if given[name, None] != "none"} == {"pgd_homotopy", "pgd_homotopy_opening", *FORMS}
    assert {name for name in NAMES if given[name, "steps"] == "steps"} == {
        *KNOWING,
        *FORMS,
        "pgd_probe",
        "universal",
        "universal_corpus",
    }
    assert not any(given[name, "none"] != "none" for name in NAMES)


def test_by_steps_it_is_a_line_and_by_loss_each_rows_own():
    line = scales("steps", [0.0, 9.0])
    assert torch.equal(line[:, 0], line[:, 1]) and line[35, 0] == pytest.approx(35 / (100 * RAISED))
    easy, hard = scales("loss", [0.0, 9.0]).T
    begin, end = (round(100 * share) for share in FORCED)
    assert easy[33] == pytest.approx(0.99) and bool((easy[34:] == 1).all())
    assert bool((hard[: begin + 1] == 0).all()) and 0 < hard[begin + 1] < 1 and bool((hard[end + 1 :] == 1).all())


@pytest.mark.parametrize("name", KNOWING)
def test_whatever_is_minimised_is_itself_at_the_end_and_the_bases_at_the_start(subject, name):
    config = AttackConfig(name)
    objective = make_objective(subject, BEHAVIORS, PICTURES, config, RESPONSES)
    annealed = Annealed(objective, subject.model, "steps", 2)
    annealed.begin(1)
    with torch.no_grad():
        called = annealed(PIXELS)
        start = called - annealed.handicap(0)
        with subject.model.adapter(False):
            base = make_objective(Subject("base", subject.model), BEHAVIORS, PICTURES, config, RESPONSES)
            base.subject = Subject("base", subject.model)
            expected = base(PIXELS) if name not in ("pgd_adaptive", "pgd_clean_teacher", "pgd_eot") else None
        annealed.saw(called)
        end, own = annealed(PIXELS), objective(PIXELS)
    assert torch.equal(end, own) and not torch.allclose(start, own, atol=1e-3)
    if expected is not None:
        torch.testing.assert_close(start, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["pgd", "pgd_adaptive", "pgd_homotopy", "pgd_homotopy_opening"])
def test_a_step_on_the_way_costs_what_a_step_at_the_end_costs(subject, name):
    objective = make_objective(subject, BEHAVIORS, PICTURES, AttackConfig(name), RESPONSES)
    annealed = Annealed(objective, subject.model, "loss", 2)
    annealed.begin(9)

    def count(loss, scale):
        annealed.scales[-1] = scale
        pixels = PIXELS.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss(1 * pixels).sum(), pixels)
        return counter.get_total_flops()

    on_the_way = count(annealed, torch.tensor([0.2, 0.7]))
    assert on_the_way == count(annealed, torch.ones(2)) == count(objective, torch.ones(2)) > 0


@pytest.mark.parametrize(("way", "by"), [("adapter", "loss"), ("merged", "steps")])
def test_a_run_selects_a_picture_of_the_whole_breaker_and_every_number_of_it_verifies(files, tmp_path, by, way):
    behaviors, adapter, merged = files
    who = {"adapter": adapter} if way == "adapter" else {"model": merged, "base": "miniature"}
    names = "pgd_adaptive,pgd_homotopy,pgd_homotopy_opening" if way == "adapter" else "pgd_homotopy"
    run = attack(tmp_path / "run", behaviors, names, steps=10, batch=2, anneal=by, **who)
    for item in map(json.loads, (run / "items.jsonl").read_text().splitlines()):
        (candidate,) = item["candidates"]
        least = RAISED if by == "steps" else 1 / 3
        assert item["anneal"] == by and item["subject"] == "rr" and candidate["selected_step"] >= 10 * least
        assert candidate["objective_file"] == pytest.approx(candidate["objective_logged"], abs=1e-4)
    for curve in json.loads((run / "curves.json").read_text()):
        assert max(curve["q75"]) < 100  # without what stands on top of the losses on the way
    assert json.loads((run / "protocol.json").read_text())["anneal"] == dict.fromkeys(names.split(","), by)
    assert json.loads((run / "run.json").read_text())["recipe"]["options"]["anneal"] == by
    assert not [row for row in verify_run(run) if row.disagreements]


def test_told_an_opening_it_knows_the_breaker_and_minimises_what_pgd_does(subject):
    entry = attack_entry("pgd_homotopy_opening")
    assert entry.given == "opening" and entry.needs_adapter and not entry.forces_response
    assert entry.in_all and entry.in_worst_case and entry.objective == attack_entry("pgd").objective
    dialled = attack_entry("pgd_homotopy")
    assert (entry.anneal, entry.first_step, entry.search) == (dialled.anneal, dialled.first_step, dialled.search)
    found = [
        make_objective(subject, BEHAVIORS, PICTURES, AttackConfig(n), r)
        for n, r in (("pgd", RESPONSES), ("pgd_homotopy_opening", RESPONSES), ("pgd_homotopy_opening", RESPONSES[::-1]))
    ]
    with torch.no_grad():
        plain, told, other = (objective(PIXELS) for objective in found)
    assert torch.equal(plain, told) and torch.equal(told, other)  # no text behind the opening reaches it


def test_a_run_that_was_cut_off_goes_on_at_its_scale(files, tmp_path, monkeypatch):
    behaviors, adapter, _ = files
    settings = {"adapter": adapter, "steps": 7, "batch": 2, "checkpoint_seconds": 0.0, "anneal": "loss"}
    whole = attack(tmp_path / "whole", behaviors, "pgd_homotopy", **settings)
    real, calls = Annealed.__call__, []

    def dies(self, pixels):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, pixels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Annealed, "__call__", dies)
        attack(tmp_path / "cut", behaviors, "pgd_homotopy", **settings)
    attack(tmp_path / "cut", behaviors, "pgd_homotopy", **settings)
    assert (tmp_path / "cut" / "items.jsonl").read_bytes() == (whole / "items.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("attacks", "more", "match"),
    [
        ("pgd", {"anneal": "steps"}, "give the `--adapter`, or the `--base`"),
        ("pgd_homotopy", {}, "give the `--adapter`, or the `--base`"),
        ("pgd_homotopy", {"base": "miniature"}, "the same weights"),
        ("pgd_homotopy", {"base": "ADAPTER", "adapter": "ADAPTER"}, "the base is the `--model`"),
        ("pgd_homotopy", {"adapter": "IDLE"}, "changes no logit"),
        ("apgd,noise", {"adapter": "ADAPTER", "anneal": "loss"}, "`--anneal` is for an attack by PGD on pixels"),
    ],
)
def test_what_cannot_be_annealed_is_refused(files, tmp_path, attacks, more, match):
    behaviors, adapter, _ = files
    idle = save_adapter(tmp_path / "idle", 0)
    config = json.loads((idle / "adapter_config.json").read_text())
    (idle / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    more = {key: {"ADAPTER": adapter, "IDLE": str(idle)}.get(value, value) for key, value in more.items()}
    with pytest.raises(UserError, match=match):
        attack(tmp_path / "run", behaviors, attacks, **more)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("pgd_homotopy", (16 / 255, "cosine")),
        ("pgd_homotopy_opening", (16 / 255, "cosine")),
        ("pgd_long", (None, None)),
    ],
)
def test_it_begins_with_steps_of_half_the_budget_that_shrink_as_others_do_not(monkeypatch, subject, name, steps):
    class Seen(Exception):
        pass

    def stepping(*_, step_size=None, step_schedule=None, **__):
        raise Seen(step_size, step_schedule)

    config = AttackConfig(name)
    monkeypatch.setitem(OPTIMIZERS, config.optimizer, stepping)
    clean, generators = torch.rand(1, 3, 4, 4), [torch.Generator()]
    with pytest.raises(Seen) as seen:
        search(
            lambda x: x.sum((1, 2, 3)), clean, config, model=subject.model, generators=generators, random_start=False
        )
    assert seen.value.args == steps
