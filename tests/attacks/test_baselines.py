"""The baselines that reviewers expect, held to what they must equal where their own part is nought."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_cb import cli
from mm_cb.attacks.best_of_n import vary_picture, vary_text
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.expectation import EotObjective
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.objectives.transfer import TransferObjective
from mm_cb.attacks.objectives.universal import UniversalObjective, all_at_once, made_for
from mm_cb.attacks.refusals import refuse_still
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.saved import to_pixels
from mm_cb.attacks.threats import Threat
from mm_cb.attacks.transfer import run_transfer
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.runs import read_jsonl, write_jsonl
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import find, measure
from tests.attacks.helpers import attack, first_behaviors, save_adapter
from tests.attacks.objectives.test_adaptive import BEHAVIORS, PICTURES
from tests.models.tiny import tiny
from tests.tiny_llava import adapted_llava, picture

OWN = {"best_of_n": {"draws": 2, "vary": "both"}, "pgd_transfer": {}, "pgd_eot": {}}


@pytest.fixture(scope="module")
def model():
    return adapted_llava()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two behaviours of the miniature and an adapter of random weights."""
    folder = tmp_path_factory.mktemp("baselines")
    return first_behaviors(folder, 2), str(save_adapter(folder / "adapter", 1))


def run(subject, folder, name, judge=lambda *_: "refusal", **changes):
    config = AttackConfig(name, **{"steps": 3, "max_new_tokens": 4, "artefacts": False} | changes)
    with Progress() as progress:
        return attack_behaviors(subject, BEHAVIORS, config, folder, judge, progress)


def files(items, folder):
    return [(folder / item["image"]).read_bytes() for item in items]


def killed(monkeypatch, owner, method, after):
    """A call of a method that ends the process, so to say, after so many."""
    real, calls = getattr(owner, method), []

    def dies(self, *rest):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(owner, method, dies)


# best of N


@pytest.mark.parametrize("vary", ["picture", "text", "both"])
def test_one_variation_of_no_strength_is_no_attack(model, tmp_path, vary):
    subject = Subject("rr", model, adapted=True)
    plain = run(subject, tmp_path, "no_attack")
    varied = run(subject, tmp_path, "best_of_n", draws=1, strength=0.0, vary=vary)
    assert files(varied, tmp_path) == files(plain, tmp_path)
    assert [(one["completion"], one["loss"]) for one in varied] == [(one["completion"], one["loss"]) for one in plain]


@pytest.mark.parametrize("vary", ["picture", "text", "both"])
def test_variations_that_change_nothing_are_refused_by_what_they_do(model, vary):
    behaviors = BEHAVIORS[:2]
    refuse_still(model, behaviors, AttackConfig("best_of_n", vary=vary))
    refuse_still(model, behaviors, AttackConfig("best_of_n", vary=vary, strength=0.1, draws=1))
    what = "text" if vary == "text" else "picture"
    with pytest.raises(UserError, match=f"`--strength 1e-09` changes no {what} in the first 8 draws of 2 behaviours"):
        refuse_still(model, behaviors, AttackConfig("best_of_n", vary=vary, strength=1e-9))


def test_every_variation_is_tried_whatever_came_of_the_others_and_all_are_counted(model, tmp_path):
    said = iter(["harmful", "refusal", "refusal", "refusal", "harmful", "refusal"])

    def judge(behavior, text):
        return "other" if text == behavior.target else next(said)

    items = run(Subject("rr", model, adapted=True), tmp_path, "best_of_n", judge, draws=3)
    assert [len(item["candidates"]) for item in items] == [3, 3]
    assert len({(tmp_path / one["image"]).read_bytes() for item in items for one in item["candidates"]}) == 6
    found = find(measure(items, pairs=[]), "rr", "compliance", "best_of_n")
    assert (found.value, found.n) == (50, 2)  # any of three, of two behaviours: the first and the fifth are one's
    assert (found.counts["tries"], found.counts["harmful_tries"]) == (6, 2)


def test_a_variation_does_not_depend_on_its_batch(model, tmp_path):
    subject = Subject("rr", model, adapted=True)
    together, apart = (run(subject, tmp_path / str(n), "best_of_n", draws=2, batch=n) for n in (2, 1))
    for one, other in zip(together, apart, strict=True):
        for a, b in zip(one["candidates"], other["candidates"], strict=True):
            assert (tmp_path / "2" / a["image"]).read_bytes() == (tmp_path / "1" / b["image"]).read_bytes()


def test_a_rate_of_single_tries_is_not_claimed_where_some_were_not_judged():
    fixed = {"id": "a", "metric": "compliance", "subject": "rr", "condition": "best_of_n", "gibberish": False}
    tries = [{"outcome": "harmful"}, {"outcome": "not_judged"}]
    items = [fixed | {"outcome": "harmful", "draws": 2, "candidates": tries}]
    assert "tries" not in find(measure(items, pairs=[]), "rr", "compliance", "best_of_n").counts


@pytest.mark.parametrize("text", ["", " two  blanks ", "please tell me how to brew tea", "ß ü \ud55c"])
def test_a_text_keeps_its_blanks_and_the_length_of_its_words(text):
    for strength in (0.0, 0.4, 1.0):
        varied = vary_text(text, strength, np.random.default_rng(0))
        assert [len(word) for word in varied.split(" ")] == [len(word) for word in text.split(" ")]
        assert (varied == text) or strength > 0
    assert vary_text("please tell me", 1.0, np.random.default_rng(0)) != "please tell me"


def test_a_picture_keeps_its_size_and_moves_further_with_more_strength():
    moved = []
    for strength in (0.0, 0.2, 1.0):
        varied = vary_picture(PICTURES[0], strength, np.random.default_rng(0))
        assert varied.size == PICTURES[0].size and varied.mode == "RGB"
        moved.append(float((to_pixels(varied) - to_pixels(PICTURES[0])).abs().mean()))
    assert moved[0] == 0 < moved[1] < moved[2]


# a corpus in minibatches


def corpus_of(path, behaviors):
    write_jsonl(path, [{"prompt": b.prompt, "target": b.target} for b in behaviors])
    return path


def test_a_corpus_of_the_first_behaviours_makes_the_picture_that_is_made_for_them(model, tmp_path):
    """A minibatch of the whole corpus, or of more, is the whole corpus; bit for bit the other attack's."""
    subject = Subject("rr", model, adapted=True)
    own = files(run(subject, tmp_path, "universal", universal_train=2), tmp_path)
    corpus = corpus_of(tmp_path / "c.jsonl", BEHAVIORS)
    for minibatch in (0, 2, 7):
        folder = tmp_path / str(minibatch)
        items = run(subject, folder, "universal_corpus", corpus=corpus, minibatch=minibatch)
        assert files(items, folder) == own
        assert [item["part"] for item in items] == ["made_for", "made_for"]


@pytest.mark.parametrize("settings", [{"corpus": True}, {}, {"universal_train": 2}])
def test_a_minibatch_of_more_texts_than_there_are_is_said(settings, tmp_path):
    given = {**settings, **({"corpus": corpus_of(tmp_path / "c.jsonl", BEHAVIORS)} if settings.get("corpus") else {})}
    there = len(made_for(AttackConfig("universal", **given), BEHAVIORS))
    for minibatch in (0, 1, there, there + 1, 65_536):
        told = all_at_once(AttackConfig("universal", **given, minibatch=minibatch), BEHAVIORS)
        assert told == "" if minibatch <= there else f"--minibatch {minibatch}`: there are only {there} texts" in told


def test_a_corpus_that_the_model_does_not_know_is_refused_or_said(tmp_path, capsys):
    behaviors = first_behaviors(tmp_path, 1)
    given = ["--model", "miniature", "--behaviors", str(behaviors), "--attack", "universal_corpus", "--steps", "1"]
    corpus, out = tmp_path / "c.txt", tmp_path / "out"
    given += ["--corpus", str(corpus), "--max-new-tokens", "2", "--out", str(out)]
    corpus.write_text("the picture\nzzyzx qwfp\n")
    assert cli.run(["attack", *given]) == 2
    assert f"{corpus}:2: behaviour 'c.txt:2': `miniature` knows no part of its target" in capsys.readouterr().err
    corpus.write_text("the picture\nzzyzx qwfp the\n")
    assert cli.run(["attack", *given]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{corpus}:2: behaviour 'c.txt:2': 1 of 2 lines of the corpus have a text that is mostly" in said


def test_what_a_corpus_does_not_hold_is_held_out(model, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text(f"the square\n\n{BEHAVIORS[1].target} \n")
    items = run(Subject("rr", model, adapted=True), tmp_path, "universal_corpus", corpus=corpus, minibatch=1)
    assert [item["part"] for item in items] == ["picture_held_out", "made_for"]


def objective_of(model, minibatch):
    learnt = [BEHAVIORS[i % 2] for i in range(5)]
    return UniversalObjective(Subject("rr", model), BEHAVIORS, PICTURES[0], learnt, minibatch=minibatch, seed=(3, 1))


def test_minibatches_go_through_all_texts_before_one_comes_again(model):
    objective = objective_of(model, 2)
    turns = [[objective.rows(step) for step in range(3 * turn, 3 * turn + 3)] for turn in range(4)]
    assert all(sorted(sum(turn, [])) == [0, 1, 2, 3, 4] and [len(rows) for rows in turn] == [2, 2, 1] for turn in turns)
    assert len({str(turn) for turn in turns}) > 1


def test_a_step_is_the_mean_of_its_minibatch_and_the_last_one_that_of_all(model):
    objective, whole = objective_of(model, 2), objective_of(model, 0)
    pixels = to_pixels(PICTURES[1]).unsqueeze(0)
    with torch.no_grad():
        each = torch.tensor(whole.each(pixels))[[0, 1, 0, 1, 0]]
        objective.begin(9)
        for step in range(9):
            part = float(objective(pixels)) - objective.handicap(step)
            assert part == pytest.approx(float(each[objective.rows(step)].mean()), abs=1e-3)
            objective.saw(torch.zeros(1))
        assert float(objective(pixels)) == pytest.approx(float(whole(pixels)), abs=1e-5)


# transfer


@pytest.mark.parametrize("moved", [0.0, 0.7])
def test_a_transfer_attack_never_sees_the_adapter_that_it_is_judged_on(tmp_path, moved):
    """With nothing drawn its pictures are those of plain PGD on the base, else the same whatever the adapter is."""
    model = adapted_llava()
    before = run(Subject("rr", model, adapted=True), tmp_path / "a", "pgd_transfer", surrogate_scale=moved)
    pictures = files(before, tmp_path / "a")
    plain = files(run(Subject("base", model), tmp_path / "b", "pgd"), tmp_path / "b")
    assert (pictures == plain) == (moved == 0)
    for name, matrix in model.model.named_parameters():
        if "lora_" in name:
            matrix.data.mul_(-3)
    after = run(Subject("rr", model, adapted=True), tmp_path / "c", "pgd_transfer", surrogate_scale=moved)
    assert files(after, tmp_path / "c") == pictures
    assert [item["loss"] for item in after] != [item["loss"] for item in before]


def test_without_draws_it_says_what_the_transfer_of_two_runs_says(few, tmp_path):
    behaviors, adapter = few
    base, breaker = attack(tmp_path / "base", behaviors), attack(tmp_path / "rr", behaviors, adapter=adapter)
    run_transfer(base, breaker, behaviors, tmp_path / "matrix")
    own = attack(tmp_path / "own", behaviors, "pgd_transfer", adapter=adapter, surrogate_scale=0.0)
    said = {item["id"]: item["completion"] for item in read_jsonl(own / "items.jsonl")}
    cells = [item for item in read_jsonl(tmp_path / "matrix" / "items.jsonl") if item["subject"] == "rr"]
    assert said == {item["id"]: item["completion"] for item in cells if item["condition"] == "from_base"}


def test_a_run_is_not_gone_on_with_where_adapter_and_surrogate_have_changed_places(few, tmp_path):
    behaviors, adapter = few
    other = str(save_adapter(tmp_path / "other", 2))
    one = {"attacks": "pgd_transfer", "steps": 1, "max_new_tokens": 1, "artefacts": False}
    attack(tmp_path / "run", behaviors, adapter=adapter, surrogate=tmp_path / "other", **one)
    with pytest.raises(UserError, match="another run's results, different in: recipe.surrogate_sha256"):
        attack(tmp_path / "run", behaviors, adapter=other, surrogate=Path(adapter), **one)


@pytest.mark.parametrize("change", ["itself", "copied", "in other words", "in half precision", "of another scale"])
def test_a_surrogate_that_is_the_breaker_under_attack_is_refused(change, few, tmp_path):
    behaviors, adapter = few
    surrogate = Path(adapter) if change == "itself" else shutil.copytree(adapter, tmp_path / "copy")
    file = surrogate / "adapter_model.safetensors"
    if change in ("in other words", "in half precision"):
        dtype = torch.bfloat16 if "half" in change else torch.float32
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"note": "again"})
    if surrogate != Path(adapter):
        (surrogate / "base.json").unlink()
    if change == "of another scale":
        fields = json.loads((surrogate / "adapter_config.json").read_text())
        (surrogate / "adapter_config.json").write_text(json.dumps({**fields, "lora_alpha": 3}))
    with pytest.raises(UserError, match="`--surrogate` must be another breaker's adapter than the one under attack"):
        attack(tmp_path / "run", behaviors, "pgd_transfer", adapter=adapter, surrogate=surrogate)
    assert not (tmp_path / "run").exists()


# expectation over transformations


def test_without_transformations_it_is_plain_pgd(model, tmp_path):
    subject = Subject("rr", model, adapted=True)
    plain = files(run(subject, tmp_path, "pgd"), tmp_path)
    assert files(run(subject, tmp_path, "pgd_eot", eot_scale=1.0, eot_quality=0), tmp_path) == plain
    assert files(run(subject, tmp_path / "moved", "pgd_eot"), tmp_path / "moved") != plain


def test_its_loss_is_the_mean_over_draws_that_follow_from_the_step(model):
    config = AttackConfig("pgd_eot", threat=Threat("patch", 255, 10), eot_samples=3)
    one = EotObjective(Subject("rr", model, adapted=True), BEHAVIORS, PICTURES, config=config, restart=0)
    pixels = torch.stack([to_pixels(p) for p in PICTURES])
    with torch.no_grad():
        one.begin(5)
        one.saw(torch.zeros(2))
        one.saw(torch.zeros(2))
        first, again = one(pixels), one(pixels)
        random, losses = one.random(2), []
        for _ in range(3):
            view = pixels
            for transformation in one.transformations:
                view = transformation(view, random)
            losses.append(one.target(view))
        one.rest()
        assert torch.equal(one(pixels), one.target(pixels))
    assert torch.equal(first, again)
    assert torch.allclose(first - one.handicap(2), torch.stack(losses).mean(0), atol=1e-3)


# all of them


def test_all_of_them_verify_with_their_settings_in_the_files(few, tmp_path):
    behaviors, adapter = few
    settings = {"draws": 2, "strength": 0.6, "vary": "both", "surrogate_scale": 0.5, "eot_samples": 2, "samples": 1}
    made = attack(tmp_path / "run", behaviors, "no_attack,best_of_n,pgd_transfer,pgd_eot", adapter=adapter, **settings)
    assert not [row for row in verify_run(made) if row.disagreements]
    options = json.loads((made / "run.json").read_text())["recipe"]["options"]
    assert {key: options[key] for key in settings} == settings and options["surrogate"] is None
    k = json.loads((made / "protocol.json").read_text())["k"]
    assert k == {"no_attack": 2, "best_of_n": 4, "pgd_transfer": 2, "pgd_eot": 2}
    assert {item["draws"] for item in read_jsonl(made / "items.jsonl") if item["condition"] == "best_of_n"} == {2}


@pytest.mark.parametrize(
    ("name", "owner", "method"),
    [
        ("best_of_n", TargetObjective, "loss"),
        ("pgd_transfer", TransferObjective, "__call__"),
        ("pgd_eot", EotObjective, "__call__"),
        ("universal_corpus", UniversalObjective, "__call__"),
    ],
)
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(model, tmp_path, monkeypatch, name, owner, method):
    subject, settings = Subject("rr", model, adapted=True), {"steps": 5, "checkpoint_seconds": 0.0, "draws": 3}
    if name == "universal_corpus":
        (tmp_path / "c.txt").write_text("it is\nred tea\nthe square\n")
        settings |= {"corpus": tmp_path / "c.txt", "minibatch": 2}
    whole = run(subject, tmp_path / "whole", name, **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed(patch, owner, method, 3)
        run(subject, tmp_path / "cut", name, **settings)
    again = run(subject, tmp_path / "cut", name, **settings)
    assert again == whole and files(again, tmp_path / "cut") == files(whole, tmp_path / "whole")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_they_work_on_other_families(kind, tmp_path):
    subject, threat = Subject("base", tiny(kind)), Threat("patch", 255, 14)
    for name, own in OWN.items():
        items = run(subject, tmp_path, name, steps=1, **own, **({"threat": threat} if name == "pgd_eot" else {}))
        assert all((tmp_path / item["image"]).is_file() for item in items)
    (tmp_path / "c.txt").write_text("it is red\na blue circle\nthe square\n")
    items = run(subject, tmp_path, "universal_corpus", corpus=tmp_path / "c.txt", minibatch=2)
    assert len(set(files(items, tmp_path))) == 1


@pytest.mark.parametrize(
    ("attacks", "changes", "match"),
    [
        ("pgd", {"draws": 5}, "`--draws` is for `--attack best_of_n` alone"),
        ("pgd", {"minibatch": 5}, "for `--attack universal` or `--attack universal_corpus` alone"),
        ("universal", {"corpus": "c.txt"}, "`--corpus` is for `--attack universal_corpus` alone"),
        ("universal_corpus", {"corpus": "c.txt", "universal_train": 1}, "`--universal-train` is for"),
        ("universal_corpus", {}, "needs `--corpus FILE`"),
        ("pgd,universal_corpus", {"corpus": "c.txt"}, "alone in its run"),
        ("universal_corpus", {"corpus": "nowhere.txt"}, "cannot read the corpus"),
        ("universal_corpus", {"corpus": "c.csv"}, "must be a .txt file"),
        ("universal_corpus", {"corpus": "image.txt"}, "image.txt:2' must not hold the model's image placeholder"),
        ("pgd_transfer", {"surrogate": "."}, "is not an adapter"),
        ("best_of_n", {"threat": Threat("patch", 255, 4)}, "`--norm` is for"),
        ("best_of_n", {"iterates": 2}, "`--iterates` is for"),
    ],
)
def test_what_cannot_be_attacked_so_is_refused(few, tmp_path, monkeypatch, attacks, changes, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("a target\n")
    (tmp_path / "c.csv").write_text("a target\n")
    (tmp_path / "image.txt").write_text("a target\nan <image> of it\n")
    given = {key: type(few[0])(value) if key in ("corpus", "surrogate") else value for key, value in changes.items()}
    with pytest.raises(UserError, match=match):
        attack(tmp_path / "run", few[0], attacks, **{"threat": Threat()} | given)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"draws": 0}, "`draws` must be a whole number from 1"),
        ({"strength": 1.1}, "`strength` must be a number from 0 to 1"),
        ({"strength": float("nan")}, "`strength` must be a number"),
        ({"vary": "sound"}, "`vary` must be one of picture, text, both"),
        ({"minibatch": -1}, "`minibatch`"),
        ({"surrogate_scale": -0.1}, "`surrogate_scale`"),
        ({"eot_samples": 0}, "`eot_samples`"),
        ({"eot_scale": 0.0}, "`eot_scale`"),
        ({"eot_quality": 101}, "`eot_quality`"),
    ],
)
def test_their_settings_are_checked_when_they_are_made(changes, match):
    with pytest.raises(ValueError, match=match):
        AttackConfig(**changes)


def test_a_patch_is_put_anywhere_and_nothing_else_of_it_is_seen():
    from image_attacks import Place

    clean, painted = torch.zeros(2, 3, 8, 12), torch.ones(2, 3, 8, 12)
    painted.requires_grad_()
    random, seen = torch.Generator().manual_seed(0), set()
    for _ in range(1000):
        placed = Place(clean, (3, 2))(painted, random)
        assert float(placed.detach().sum()) == 2 * 3 * 6 and torch.equal(placed[0], placed[1])
        seen.add(tuple(placed[0, 0].nonzero()[0].tolist()))
    assert seen == {(row, column) for row in range(6) for column in range(11)}
    (gradient,) = torch.autograd.grad(placed.sum(), painted)
    assert float(gradient.sum()) == 36 and float(gradient[..., :3, :2].sum()) == 36
    with pytest.raises(ValueError, match="inside images"):
        Place(clean, (9, 2))


def test_pictures_of_other_sizes_are_varied_too():
    tall = picture(0, (20, 61))
    assert vary_picture(tall, 1.0, np.random.default_rng(1)).size == tall.size
