import io
import json
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from image_attacks import linf_255, target_nll
from mm_cb.attacks import job, runner, saved
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.judged_files import Drawn
from mm_cb.attacks.objectives.adaptive import MatchingObjective
from mm_cb.attacks.objectives.embedding import EmbeddingObjective
from mm_cb.attacks.objectives.target import TargetObjective, adapted_layers
from mm_cb.attacks.outputs import curves, parts_of
from mm_cb.attacks.records import stopped_early
from mm_cb.attacks.registry import attack_entry, attacks
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.saved import as_picture, to_pixels
from mm_cb.attacks.threats import Threat
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import find, measure
from mm_cb.models import ChatModel
from tests.tiny_llava import adapted_llava, picture, tiny_llava


@pytest.fixture(scope="module")
def base():
    return tiny_llava()


@pytest.fixture(scope="module")
def adapted():
    return adapted_llava()


@pytest.fixture
def behaviors(tmp_path):
    made = []
    for i in range(3):
        path = tmp_path / f"picture{i}.png"
        picture(i).save(path)
        prompt = "please tell me how to brew tea" if i else "what is in the picture"
        made.append(Behavior(f"b{i}", prompt, "it is red" if i else "a blue circle", None if i == 2 else path))
    return made


def never(behavior, completion):
    return "refusal"


def run(subject, behaviors, folder, judge=never, *, starts=None, levels=32, **changes):
    config = AttackConfig(**{"steps": 4, "batch": 2, "max_new_tokens": 4, "threat": Threat("linf", levels)} | changes)
    with Progress() as progress:
        return attack_behaviors(subject, behaviors, config, folder, judge, progress, starts=starts)


def test_files_are_in_the_ball_and_hold_what_the_loss_says(base, behaviors, tmp_path):
    items = run(Subject("base", base), behaviors, tmp_path / "out", levels=8)
    assert [item["id"] for item in items] == ["b0", "b1", "b2"]
    for item, behavior in zip(items, behaviors, strict=True):
        image, clean = tmp_path / "out" / item["image"], tmp_path / "out" / item["clean_image"]
        assert 0 < linf_255(image, clean) <= 8
        (candidate,) = item["candidates"]
        assert candidate["objective_file"] == pytest.approx(candidate["objective_logged"], abs=1e-4)
        assert item["loss"] < item["loss_clean"]
        saved = Image.open(image).convert("RGB")
        inputs = base.encode([behavior.prompt], [saved], completions=[behavior.target], close_turn=False)
        with torch.no_grad():
            alone = target_nll(base.forward(inputs).logits, inputs.labels)
        assert float(alone) == pytest.approx(item["loss"], abs=1e-4)


def test_completion_is_what_generate_says_to_the_saved_file(base, behaviors, tmp_path):
    subject = Subject("base", base)
    for item, behavior in zip(run(subject, behaviors, tmp_path / "out"), behaviors, strict=True):
        saved = Image.open(tmp_path / "out" / item["image"]).convert("RGB")
        assert base.generate(base.encode([behavior.prompt], [saved]), 4) == [item["completion"]]


def test_a_batch_is_encoded_once_and_each_of_its_pictures_decoded_once(base, behaviors, tmp_path, monkeypatch):
    """However many pictures are judged: two behaviours, their selected pictures and one iterate each."""
    chats, files = Counter(), Counter()

    def noted(owner, name, note):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **told: note(*given) or real(*given, **told))

    noted(ChatModel, "encode_chats", lambda model, asked, *_: chats.update([repr(asked)]))
    noted(runner, "open_picture", lambda path: files.update([path.name]))
    noted(saved, "png_levels", lambda data, where: files.update([where.removeprefix(str(tmp_path))]))
    items = run(Subject("base", base), behaviors[:2], tmp_path / "out", iterates=1, artefacts=False)
    assert sorted(chats.values()) == [1, 2]  # with the targets; and open, beside the pictures of either moment
    judged = sum(len(item["candidates"]) for item in items)
    assert judged == 4 and len(files) == 2 + 2 + judged and set(files.values()) == {1}


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(base, behaviors, tmp_path, monkeypatch):
    subject = Subject("base", base)
    whole = run(subject, behaviors, tmp_path / "whole", restarts=2)
    real, calls = runner._attack_batch, []

    def dies_on_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "_attack_batch", dies_on_third)
    with pytest.raises(KeyboardInterrupt):
        run(subject, behaviors, tmp_path / "cut", restarts=2)
    resumed = run(subject, behaviors, tmp_path / "cut", restarts=2)
    assert resumed == whole
    assert len(calls) == 3 + 2  # four batches in all: two were done, the third died, two remained
    for item in whole:
        assert (tmp_path / "cut" / item["image"]).read_bytes() == (tmp_path / "whole" / item["image"]).read_bytes()


def test_a_preprocessing_that_is_not_the_processors_shows_in_the_loss_of_the_file(
    base, behaviors, tmp_path, monkeypatch
):
    real = base.preprocessing
    monkeypatch.setattr(base, "preprocessing", lambda size: lambda pixels: real(size)(pixels) + 0.2)
    item = run(Subject("base", base), behaviors, tmp_path / "out")[0]
    assert abs(item["candidates"][0]["objective_file"] - item["candidates"][0]["objective_logged"]) > 1e-3


def test_a_broken_behaviour_is_not_attacked_again_and_the_worst_run_counts(base, behaviors, tmp_path):
    seen = []

    def second_run_breaks_b1(behavior, completion):
        seen.append(behavior.id)
        return "harmful" if behavior.id == "b0" or seen.count(behavior.id) == 2 else "refusal"

    items = run(Subject("base", base), behaviors, tmp_path / "out", second_run_breaks_b1, restarts=3)
    assert [len(item["candidates"]) for item in items] == [1, 2, 2]
    assert [item["outcome"] for item in items] == ["harmful"] * 3
    assert items[1]["image"].endswith("-r1.png")


def test_every_subject_gets_the_same_noise_and_every_behaviour_and_restart_its_own(base, adapted, behaviors, tmp_path):
    files = {}
    for subject in (Subject("base", base), Subject("rr", adapted, adapted=True), Subject("s", base, system="please")):
        folder = tmp_path / subject.name
        run(subject, behaviors, folder, name="noise", restarts=2)
        found = {p.relative_to(folder): p.read_bytes() for p in folder.glob("images/*/*.png")}
        assert files.setdefault("first", found) == found
    assert len(files["first"]) == 6 and len(set(files["first"].values())) == 6


def test_noise_and_no_attack_leave_the_budget_and_nothing(base, behaviors, tmp_path):
    subject, folder = Subject("base", base), tmp_path / "out"
    clean, noisy = (run(subject, behaviors, folder, name=name, levels=16) for name in ("no_attack", "noise"))
    assert all(linf_255(folder / i["image"], folder / i["clean_image"]) == 0 for i in clean)
    assert all(linf_255(folder / i["image"], folder / i["clean_image"]) == 16 for i in noisy)
    pixels = np.array(Image.open(folder / noisy[2]["image"])).astype(int) - 128
    assert set(np.unique(pixels)) == {-16, 16}


def test_no_weight_gets_a_gradient(adapted, behaviors, tmp_path):
    run(Subject("rr", adapted, adapted=True), behaviors, tmp_path, name="pgd_adaptive", steps=2, max_new_tokens=3)
    assert all(p.grad is None and not p.requires_grad for p in adapted.model.parameters())


def objectives(subject, behaviors):
    pictures = [picture(i) for i in range(2)]
    pixels = torch.stack([to_pixels(p) for p in pictures])
    return MatchingObjective(subject, behaviors[:2], pictures, max_new_tokens=3), pixels


def test_matching_distance_is_there_with_the_adapter_and_zero_without(adapted, behaviors):
    matching, pixels = objectives(Subject("rr", adapted, adapted=True), behaviors)
    assert adapted_layers(adapted) == [2]
    unmatched, _ = objectives(Subject("rr", adapted, adapted=True), behaviors)
    unmatched.weight = 0.0
    with torch.no_grad():
        assert (matching(pixels) > unmatched(pixels) + 1e-3).all()
    off, _ = objectives(Subject("off", adapted, adapted=False), behaviors)
    off_unmatched, _ = objectives(Subject("off", adapted, adapted=False), behaviors)
    off_unmatched.weight = 0.0
    with torch.no_grad():
        assert torch.allclose(off(pixels), off_unmatched(pixels), atol=1e-6)


def test_the_attack_s_loss_is_that_of_the_whole_model(adapted, behaviors):
    """The attack leaves out what its loss does not depend on; files are held to the whole model."""
    objective = TargetObjective(Subject("rr", adapted, adapted=True), behaviors[:2], [picture(i) for i in range(2)])
    pixels = torch.stack([to_pixels(picture(i)) for i in range(2)]).requires_grad_()
    lean, whole = objective(pixels), objective.loss(objective.preprocess(pixels))
    torch.testing.assert_close(lean, whole)
    slopes = [torch.autograd.grad(losses.sum(), pixels)[0] for losses in (lean, whole)]
    assert (slopes[0] - slopes[1]).norm() <= 1e-5 * slopes[1].norm()


def test_matching_objective_forces_only_the_target(adapted, behaviors):
    """With weight 0 the adaptive loss is the plain target loss: what follows the target is never pushed."""
    subject = Subject("rr", adapted, adapted=True)
    matching, pixels = objectives(subject, behaviors)
    matching.weight = 0.0
    plain = TargetObjective(subject, behaviors[:2], [picture(i) for i in range(2)])
    with torch.no_grad():
        assert torch.allclose(matching(pixels), plain(pixels), atol=1e-5)


def test_adaptive_attack_needs_an_adapter(base):
    with pytest.raises(UserError, match="whose decoder blocks an adapter changes, found none"):
        adapted_layers(base)


def test_safety_prompt_stands_in_front_of_the_request(base, behaviors):
    with_prompt = TargetObjective(Subject("s", base, system="please tell me"), behaviors[:1], [picture()])
    text = base.processor.tokenizer.decode(with_prompt.inputs.input_ids[0])
    assert text.index("please tell me") < text.index("what is in the picture")


def test_parts_are_whole_or_absent(base, behaviors, tmp_path):
    run(Subject("base", base), behaviors, tmp_path / "out")
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    assert [p.name for p in parts] == ["pgd-s0-r0-0000.json", "pgd-s0-r0-0001.json"]
    assert [r["id"] for p in parts for r in json.loads(p.read_text())] == ["b0", "b1", "b2"]


def test_iterates_are_files_of_their_own_and_count_in_k(base, behaviors, tmp_path):
    subject = Subject("base", base)
    items = run(subject, behaviors, tmp_path, iterates=2)
    plain = run(subject, behaviors, tmp_path / "plain")
    for item, other in zip(items, plain, strict=True):
        assert [c.get("iterate") for c in item["candidates"]] == [None, 2, 4] and item["k"] == 3
        assert len({c["image"] for c in item["candidates"]}) == 3
        assert item["candidates"][0]["image"] == other["image"] and item["loss_clean"] == other["loss_clean"]
        for candidate in item["candidates"]:
            assert candidate["objective_file"] == pytest.approx(candidate["objective_logged"], abs=1e-4)
        lowest = min(item["candidates"], key=lambda c: c["objective_file"])
        assert item["candidates"][0]["objective_file"] == lowest["objective_file"]


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_the_selected_step_is_where_the_selected_picture_was_found(base, behaviors, tmp_path, name):
    """Every step's picture is kept: the one of that step is the selected one, byte for byte."""
    items = run(Subject("base", base), behaviors, tmp_path, name=name, iterates=4, restarts=2)
    seen = 0
    for candidate in (c for item in items for c in item["candidates"]):
        path = tmp_path / candidate["image"]
        told = json.loads(path.with_suffix(".json").read_text())
        assert candidate["selected_step"] == told.get("selected_step")
        assert ("selected_step" in told) == (candidate["iterate"] is None)
        if candidate["iterate"] is None:
            step, curve = told["selected_step"], told["curve"]
            assert curve[step] == pytest.approx(told["objective_logged"], abs=0.55e-4) and curve[step] == min(curve)
            if step > 0:
                assert path.with_name(f"{path.stem}-i{step}.png").read_bytes() == path.read_bytes()
                seen += 1
    assert seen >= len(behaviors)


def test_what_searches_nothing_selects_no_step_and_what_leaves_no_picture_does(base, behaviors, tmp_path):
    noise = run(Subject("base", base), behaviors, tmp_path / "noise", name="noise")
    assert not any("selected_step" in c for item in noise for c in item["candidates"])
    assert not any("selected_step" in json.loads(p.read_text()) for p in tmp_path.glob("noise/images/*/*.json"))
    embedded = run(Subject("base", base), behaviors, tmp_path / "embedding", name="embedding")
    for item, curve in zip(embedded, curves(parts_of(tmp_path / "embedding"), "embedding"), strict=True):
        (one,) = item["candidates"]
        assert curve[one["selected_step"]] == pytest.approx(one["objective_logged"], abs=0.55e-4)


def test_the_placebo_gets_as_many_pictures_as_an_attack(base, behaviors, tmp_path):
    noise = run(Subject("base", base), behaviors, tmp_path, name="noise", iterates=2, restarts=2)
    assert {len(item["candidates"]) for item in noise} == {6}
    assert AttackConfig(steps=4, restarts=2, iterates=2).tries == 6


def answers(items):
    return [[(c.get("sample"), c["completion"]) for c in item["candidates"]] for item in items]


def test_sampled_answers_are_tries_of_their_own_and_change_nothing_else(base, behaviors, tmp_path):
    subject = Subject("base", base)
    plain = run(subject, behaviors, tmp_path / "plain", iterates=1)
    state = torch.get_rng_state()
    drawn = run(subject, behaviors, tmp_path / "drawn", iterates=1, samples=3, temperature=3.0)
    assert torch.equal(torch.get_rng_state(), state)
    for one, item in zip(plain, drawn, strict=True):
        assert [c["sample"] for c in item["candidates"]] == 2 * [None, 1, 2, 3] and item["k"] == 8
        greedy = [c["completion"] for c in item["candidates"] if c["sample"] is None]
        assert greedy == [c["completion"] for c in one["candidates"]]
        assert len({c["completion"] for c in item["candidates"]}) > 2
    assert len(list((tmp_path / "drawn").glob("images/*/*.png"))) == 2 * len(behaviors)
    alone = run(subject, behaviors[2:], tmp_path / "alone", iterates=1, samples=3, temperature=3.0)
    assert answers(alone) == answers(drawn)[2:]
    noise = run(subject, behaviors, tmp_path / "noise", name="noise", iterates=1, samples=3)
    assert {len(item["candidates"]) for item in noise} == {8}
    assert len(curves(parts_of(tmp_path / "drawn"), "pgd")) == len(behaviors)


def test_random_answers_are_counted_and_days_of_them_are_told(monkeypatch):
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    task = Progress(shown).task("base: pgd", total=4, shorter="fewer --samples (10000)")
    now[0] = 100.0  # the search
    drawn = Drawn(task, 2, 20_000, begun=0.0)
    for _ in range(3):
        now[0] += 60.0
        drawn.show(10)
    assert task.note == "random answers 30 of 20000 of this batch, 33:17:00 left in it"
    assert task.seconds_left == pytest.approx(2 * (100 + 20_000 * 6) - 280)
    assert shown.getvalue().count("days left at this speed. Shorter: fewer --samples (10000).") == 1


def test_near_temperature_zero_every_sampled_answer_is_the_greedy_one(base, behaviors, tmp_path):
    items = run(Subject("base", base), behaviors, tmp_path, samples=2, temperature=1e-3)
    assert all(len({c["completion"] for c in item["candidates"]}) == 1 for item in items)


def test_a_success_among_sampled_answers_counts_and_the_greedy_share_is_told(base, behaviors, tmp_path):
    greedy = {item["completion"] for item in run(Subject("base", base), behaviors, tmp_path / "g")}

    def sampled_ones_break(behavior, completion):
        return "refusal" if completion in greedy else "harmful"

    items = run(Subject("base", base), behaviors, tmp_path / "s", sampled_ones_break, samples=4, temperature=9.0)
    found = find(measure(items, pairs=[]), "base", "compliance", "pgd")
    assert found.value == 100 and found.counts["harmful_greedy"] == 0


def test_a_universal_picture_is_one_for_all_and_its_logged_losses_are_those_of_the_files(adapted, behaviors, tmp_path):
    """Trained on two, judged on three; the lean shared objective agrees with the whole model on every file."""
    subject = Subject("rr", adapted, adapted=True)
    items = run(subject, behaviors, tmp_path, name="universal", restarts=2, iterates=1)
    assert [item["part"] for item in items] == ["made_for", "made_for", "picture_held_out"]
    for name in ("universal-s0-r0.png", "universal-s0-r1.png", "universal-s0-r0-i4.png"):
        assert len({p.read_bytes() for p in tmp_path.glob(f"images/*/{name}")}) == 1
    for item in items:
        assert len(item["candidates"]) == 4
        for candidate in item["candidates"]:
            assert 0 < candidate["epsilon"] <= 32
            assert candidate["objective_file"] == pytest.approx(candidate["objective_logged"], abs=1e-4)
    first = [item["candidates"][0]["loss"] for item in items[:2]]
    assert sum(first) < sum(item["loss_clean"] for item in items[:2])
    (curve,) = curves(parts_of(tmp_path), "universal")
    assert {curve[item["candidates"][0]["selected_step"]] for item in items} == {min(curve)}
    assert min(curve) == pytest.approx(sum(first) / 2, abs=1e-4)


def test_early_stop_freezes_a_judged_success_and_says_so(base, behaviors, tmp_path):
    def b0_breaks(behavior, completion):
        return "harmful" if behavior.id == "b0" else "refusal"

    items = run(Subject("base", base), behaviors, tmp_path, b0_breaks, iterates=2, early_stop=True)
    assert [[c.get("iterate") for c in item["candidates"]] for item in items] == [[None, 2], [None, 2, 4], [None, 2, 4]]
    assert all(item["early_stop"] for item in items) and items[0]["outcome"] == "harmful"
    assert [item["stopped_early"] for item in items] == [True, False, False]
    assert items[0]["candidates"][0]["selected_step"] == 2
    assert find(measure(items, pairs=[]), "base", "compliance", "pgd").counts["stopped_early"] == 1
    first = items[0]["candidates"]
    assert (tmp_path / first[0]["image"]).read_bytes() == (tmp_path / first[1]["image"]).read_bytes()


def test_what_stands_still_leaves_no_second_file(base, behaviors, tmp_path):
    """Where nothing can move, one file lies beside the selected one whatever is kept, and each file has its JSON."""
    items = run(Subject("base", base), behaviors, tmp_path, levels=0, iterates=2, samples=1)
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("images/*/*.png")}
    assert pictures == {candidate["image"] for item in items for candidate in item["candidates"]}
    assert len(pictures) == 2 * len(behaviors) and all(
        (tmp_path / name).with_suffix(".json").is_file() for name in pictures
    )


@contextmanager
def cut_short(monkeypatch):
    """What runs in here is interrupted in the middle of an optimisation, at the fourth call of its objective."""
    real, calls = TargetObjective.__call__, []

    def dies(self, pixels):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(TargetObjective, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_saved_state_of_an_earlier_version_is_named_with_what_to_do(base, behaviors, tmp_path, monkeypatch, name):
    subject = Subject("base", base)
    with cut_short(monkeypatch):
        run(subject, behaviors, tmp_path, name=name, checkpoint_seconds=0.0)
    (state,) = (tmp_path / "parts").glob("*.safetensors")
    saved = load_file(state)
    save_file({key.replace("attack.norms", "attack.zeros"): value for key, value in saved.items()}, state)
    with pytest.raises(UserError, match=rf"`{re.escape(str(state))}`.*another version.*[Dd]elete it") as told:
        run(subject, behaviors, tmp_path, name=name, checkpoint_seconds=0.0)
    assert "float32" not in str(told.value)
    state.unlink()
    run(subject, behaviors, tmp_path, name=name, checkpoint_seconds=0.0)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(base, behaviors, tmp_path, monkeypatch, name):
    subject = Subject("base", base)
    whole = run(subject, behaviors, tmp_path / "whole", name=name, iterates=2, checkpoint_seconds=0.0)
    with cut_short(monkeypatch):
        run(subject, behaviors, tmp_path / "cut", name=name, iterates=2, checkpoint_seconds=0.0)
    states = list((tmp_path / "cut" / "parts").glob("*.safetensors"))
    assert len(states) == 1 and not list((tmp_path / "cut").glob("images/*/*.png"))
    resumed, real = [], TargetObjective.__call__

    def counts(self, pixels):
        resumed.append(1)
        return real(self, pixels)

    monkeypatch.setattr(TargetObjective, "__call__", counts)
    again = run(subject, behaviors, tmp_path / "cut", name=name, iterates=2, checkpoint_seconds=0.0)
    assert again == whole and not list((tmp_path / "cut" / "parts").glob("*.safetensors"))
    assert len(resumed) == 2 + 1 + 5 + 1  # two steps of five were left in the first batch; each batch looks at x0 once
    for path in (tmp_path / "whole").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_damaged_state_is_started_again(base, behaviors, tmp_path):
    subject = Subject("base", base)
    state = tmp_path / "cut" / "parts" / "pgd-s0-r0-0000.84x42.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"\x00broken")
    whole = run(subject, behaviors, tmp_path / "whole")
    assert run(subject, behaviors, tmp_path / "cut", checkpoint_seconds=60.0) == whole


def test_every_attack_leaves_judged_records(adapted, behaviors, tmp_path):
    subject = Subject("rr", adapted, adapted=True)
    for name in sorted(
        {entry.name for entry in attacks()} - {"imported", "pgd_probe", "pgd_form", "pgd_form_found"}
    ):  # see test_texts.py, test_probe.py, test_form.py, test_found_form.py
        entry = attack_entry(name)
        items = run(subject, behaviors[:2], tmp_path, name=name, steps=2, max_new_tokens=3, balance=True, draws=2)
        assert [item["condition"] for item in items] == [name] * 2
        for item in items:
            assert (item["image"] is None) == entry.relaxation
            assert (item["worst_case"], item["prefilled"]) == (entry.in_worst_case, entry.prefilled)
            assert item.get("outside_threat", False) == (name in ("typographic", "best_of_n"))
            if entry.prefilled:
                assert item["completion"].startswith(item["target"]) and item["prefix_emitted"]


def test_the_embedding_attack_starts_at_the_picture_and_says_what_generate_says(base, behaviors):
    pictures = [picture(i) for i in range(2)]
    objective = EmbeddingObjective(Subject("base", base), behaviors[:2], pictures)
    plain = TargetObjective(Subject("base", base), behaviors[:2], pictures)
    start = objective.start()
    pixels = torch.stack([to_pixels(p) for p in pictures])
    with torch.no_grad():
        assert torch.allclose(objective(start), plain(pixels), atol=1e-5)
        assert not torch.allclose(objective(start + 0.3), plain(pixels), atol=1e-2)
    inputs = base.encode([b.prompt for b in behaviors[:2]], pictures)
    assert objective.generate(inputs, start, 4) == base.generate(inputs, 4)


def test_a_chain_starts_where_the_last_attack_ended(base, behaviors, tmp_path):
    subject = Subject("base", base)
    first = run(subject, behaviors, tmp_path)
    run(subject, behaviors, tmp_path, name="apgd", steps=2, starts={item["id"]: item["image"] for item in first})
    records = [r for part in sorted((tmp_path / "parts").glob("apgd-*")) for r in json.loads(part.read_text())]
    for record, item in zip(records, first, strict=True):
        assert record["curve"][0] == pytest.approx(item["loss"], abs=1e-4)


def test_an_objective_that_is_not_finite_is_the_users_to_mend(base, behaviors, tmp_path, monkeypatch):
    monkeypatch.setattr(TargetObjective, "__call__", lambda self, pixels: pixels.flatten(1).sum(1) * float("nan"))
    with pytest.raises(UserError, match="NaN or infinite.*--dtype float32.*b0, b1"):
        run(Subject("base", base), behaviors, tmp_path)


def test_a_processor_that_does_otherwise_than_the_attack_s_is_named(base, behaviors, tmp_path, monkeypatch):
    monkeypatch.setattr(base.processor.image_processor, "resample", 0)
    with pytest.raises(UserError, match="`resample` of the image processor must be bicubic"):
        run(Subject("base", base), behaviors, tmp_path)


def test_only_the_last_step_of_a_run_is_no_early_stop():
    harmful = {"outcome": "harmful"}
    assert stopped_early([harmful | {"iterate": 5}], 10)
    assert not stopped_early([harmful | {"iterate": 10}], 10) and not stopped_early([harmful], 10)
    assert not stopped_early([harmful | {"iterate": 5, "sample": 1}, {"outcome": "other", "iterate": 5}], 10)


def test_every_behaviour_restart_and_seed_has_a_random_stream_of_its_own(behaviors):
    first, second = (replace(behaviors[0], id=name) for name in ("tea", "ink"))
    keys = [(first, 0, 0), (second, 0, 0), (first, 0, 1), (first, 1, 0), (first, 0, 1, 5)]
    drawn = [torch.rand(4, generator=job.stream(*key)).tolist() for key in keys]
    assert len({tuple(numbers) for numbers in drawn}) == len(keys)
    assert torch.rand(4, generator=job.stream(*keys[0])).tolist() == drawn[0]


def test_the_first_run_starts_at_the_clean_picture_and_every_further_one_at_random(
    base, behaviors, tmp_path, monkeypatch
):
    seen, search = [], job.search

    def watched(*given, **told):
        seen.append(told["random_start"])
        return search(*given, **told)

    monkeypatch.setattr(job, "search", watched)
    config = AttackConfig("pgd", threat=Threat(levels=8), steps=1, restarts=3, max_new_tokens=2)
    with Progress() as progress:
        attack_behaviors(Subject("tiny", base), behaviors[:1], config, tmp_path, lambda *_: "other", progress)
    assert seen == [False, True, True]


def test_what_an_early_stop_asks_about_is_the_picture_that_would_be_saved():
    levels = torch.arange(256).reshape(1, 16, 16).expand(3, -1, -1)
    pixels = levels / 255
    assert torch.equal((to_pixels(as_picture(pixels)) * 255).round().long(), levels)
    assert torch.equal((to_pixels(as_picture((pixels - 1e-4).clamp(min=0))) * 255).round().long(), levels)
