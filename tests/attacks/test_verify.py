import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mm_cb import cli
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.shards import Shard
from mm_cb.attacks.threats import Threat
from mm_cb.attacks.verify import verify_run
from mm_cb.attacks.verify_answers import _wrong
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.runs import held, read_jsonl, read_run, write_jsonl
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics.observations import rank
from mm_cb.metrics.results import measure, write_results
from mm_cb.metrics.whole import unchanged_items
from mm_cb.miniature import judge
from mm_cb.miniature.world import Brew
from mm_cb.models import load_model
from mm_cb.report.load import load_run
from tests.attacks.helpers import attack, edited, first_behaviors, restated

REFUSAL = "i cannot help with that."
WORST = ("outcome", "image", "loss", "completion", "nll_base")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return first_behaviors(tmp_path_factory.mktemp("verify"), 2, start=1)


@pytest.fixture(scope="module")
def made(two):
    """Several attacks with everything that is judged beside the selected picture."""
    out = two.parent / "several"
    return attack(out, two, "pgd,pgd_long,prefill,noise", iterates=1, samples=1, max_new_tokens=6, batch=8)


@pytest.fixture(scope="module")
def small(two):
    """One picture per behaviour, which is enough to be wrong."""
    return attack(two.parent / "small", two, "pgd_long", steps=1, max_new_tokens=6, batch=8)


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The miniature is loaded once for the whole module: to verify changes nothing in it."""
    model = load_model("miniature")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mm_cb.inference.subjects.load_model", lambda *_, **__: model)
        yield


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def few(small, tmp_path):
    return shutil.copytree(small, tmp_path / "run")


def picture_of(run, name="pgd_long-s0-r0.png"):
    return sorted((run / "images").glob(f"*/{name}"))[0]


def in_items(run, edit):
    """items.jsonl after ``edit`` of every candidate, each item its worst one, and what is counted from it."""
    items = read_jsonl(run / "items.jsonl")
    for item in items:
        for one in item["candidates"]:
            edit(one)
        item |= {key: min(item["candidates"], key=rank)[key] for key in WORST}
        item["gibberish"] = item["outcome"] == "gibberish"
    write_jsonl(run / "items.jsonl", items)
    write_results(run / "results.json", measure(items, pairs=[]))


def forge(run, **values):
    """One picture's JSON with other numbers, and the items that repeat them, as a forger would."""
    path = picture_of(run).with_suffix(".json")
    edited(path, lambda told: told.update({key: value(told[key]) for key, value in values.items()}))
    told = json.loads(path.read_text())
    repeated = {key: told[key] for key in ("epsilon", "loss", "objective_file", "nll_base")}
    in_items(run, lambda one: one.update(repeated) if one["image"] == told["image"] else None)


def refused(run, match):
    with pytest.raises(UserError, match=match):
        verify_run(run)


# honest runs


def test_an_honest_run_agrees_in_every_picture(made, capsys):
    rows = verify_run(made)
    assert len(rows) == 2 * (2 + 2 + 2 + 2) and not any(row.disagreements for row in rows)
    assert max(abs(row.loss_found - row.loss_recorded) for row in rows) <= 1e-4
    shown = " ".join(capsys.readouterr().out.split())
    assert "16 of 16 pictures agree (float32 losses to 0.0001; epsilon exactly)" in shown
    assert "0 of 16 greedy answers differ" in shown and "32 of 32 verdicts judged again, the same" in shown


@pytest.mark.parametrize(
    ("attacks", "settings"),
    [
        ("pgd,apgd,pgd_long", {"chain": True, "iterates": 1, "samples": 1, "restarts": 2, "batch": 2}),
        ("pgd", {"iterates": 2, "early_stop": True, "optimizer": "sign"}),
        ("no_attack,typographic,embedding", {}),
        ("prefill_only", {}),
        ("universal", {"universal_train": 2, "iterates": 1, "restarts": 2}),
    ],
)
def test_every_way_to_attack_verifies(two, tmp_path, attacks, settings):
    rows = verify_run(attack(tmp_path / "run", two, attacks, **{"max_new_tokens": 4} | settings))
    pictures = [p for p in (tmp_path / "run" / "images").glob("*/*.png")]
    assert len(rows) == len(pictures) >= 2 and not any(row.disagreements for row in rows)


def test_a_gathered_run_verifies_and_so_does_one_shard(two, tmp_path):
    for shard in (Shard(1, 2), Shard(2, 2), None):
        attack(tmp_path / "run", two, shard=shard, max_new_tokens=4)
    assert len(verify_run(tmp_path / "run")) == 2
    assert len(verify_run(tmp_path / "run" / "shards" / "0002-of-0002")) == 1


def test_losses_in_bfloat16_are_held_to_what_bfloat16_holds_and_a_forged_one_is_still_found(few, monkeypatch, capsys):
    """Recorded in float32, computed again in bfloat16: at least what another batch changes, no digit was chosen."""
    model = load_model("miniature", dtype="bfloat16")
    monkeypatch.setattr("mm_cb.inference.subjects.load_model", lambda *_, **__: model)
    restated(few, lambda run: run["recipe"].update(dtype="bfloat16"))
    rows = verify_run(few)
    assert all(1e-4 < abs(row.loss_found - row.loss_recorded) for row in rows)
    assert "2 of 2 pictures agree (bfloat16 losses to 0.0001 or 3.1 %" in " ".join(capsys.readouterr().out.split())
    forge(few, loss=lambda loss: round(loss * 1.1, 5))
    refused(few, "loss .* recorded")


def test_a_run_of_before_selected_steps_were_written_down_still_verifies(few):
    for path in (few / "images").glob("*/*.json"):
        edited(path, lambda told: {key: value for key, value in told.items() if key != "selected_step"})
    in_items(few, lambda one: one.pop("selected_step"))
    assert not any(row.disagreements for row in verify_run(few))


# pictures


def test_a_run_that_has_not_ended_is_said_to_be_one(few):
    restated(few, lambda run: run.update(ended=None))
    for name in ("results.json", "items.jsonl", "protocol.json", "behaviors.jsonl"):
        (few / name).unlink()
    refused(few, "has not ended; give its `mm-cb attack` again to go on")


def test_a_run_that_is_being_judged_is_in_use(few):
    with held(few):
        refused(few, "is in use by another mm-cb process, which writes there; wait for it")
        with pytest.raises(UserError, match="is in use by another"):
            load_run(few)
    assert verify_run(few) and load_run(few)


def test_one_level_of_one_pixel_is_noticed(few):
    path = picture_of(few)
    picture = Image.open(path).convert("RGB")
    red, green, blue = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red - 1 if red else 1, green, blue))
    picture.save(path)
    refused(few, rf"{path.parent.name}.*the picture is another one.*SHA-256")


def test_a_picture_of_another_size_is_named(few):
    Image.new("RGB", (3, 3)).save(picture_of(few))
    refused(few, r"pgd_long-s0-r0\.png` must have the size of its clean picture, \d+ x \d+ pixels, got 3 x 3")


def test_two_swapped_pictures_are_noticed(few):
    first, second = sorted((few / "images").glob("*/*.png"))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    refused(few, "the picture is another one.*SHA-256.*2 of 2 pictures disagree")


def test_a_swapped_clean_picture_is_noticed_even_if_the_distance_stays(few):
    path = picture_of(few)
    clean = few / json.loads(path.with_suffix(".json").read_text())["clean_image"]
    picture, attacked = Image.open(clean).convert("RGB"), Image.open(path).convert("RGB")
    picture.putpixel((3, 3), attacked.getpixel((3, 3)))  # nearer to the attacked picture in one pixel
    picture.save(clean)
    refused(few, "the clean picture is another one")


def test_a_picture_that_is_gone_is_named(few):
    path = picture_of(few)
    path.unlink()
    with pytest.raises(UserError, match=f"must hold .*{path.name}, but there is none.*another `--out`"):
        verify_run(few)


@pytest.mark.parametrize(("distance", "outside"), [(7.9, 0), (8.1, 1)])
def test_a_picture_is_held_to_the_euclidean_ball_too(distance, outside):
    config = AttackConfig("pgd", threat=Threat("l2", 255, 8.0))
    recorded = SimpleNamespace(config=config, told={"sha256": "a", "clean_sha256": "b"})
    found = SimpleNamespace(linf=200, distance=distance)
    wrong = _wrong(recorded, found, SimpleNamespace(sha256="a"), SimpleNamespace(sha256="b"))
    assert len(wrong) == outside and all("outside l2" in one for one in wrong)


def test_requests_that_were_changed_after_the_run_are_noticed_wherever_it_is_opened(few, capsys):
    with (few / "behaviors.jsonl").open("a") as file:
        file.write("\n")
    for words in (["attack", "verify"], ["report"], ["judge", "--judge", "refusal-strings"]):
        assert cli.run([*words, str(few)]) == 2
        assert "behaviors.jsonl` was changed after it was written" in capsys.readouterr().err


def test_a_picture_outside_the_run_is_refused(few):
    in_items(few, lambda one: one.update(image="../../elsewhere.png"))
    refused(few, "items.jsonl`, record 1: .*elsewhere.png")


def test_broken_and_missing_files_end_with_exit_code_2_and_one_line(few, capsys):
    def told():
        assert cli.run(["attack", "verify", str(few)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    for name in ("behaviors.jsonl", "protocol.json", "results.json"):
        held = (few / name).read_bytes()
        (few / name).unlink()
        assert name in (line := told()) and "--out" in line
        (few / name).write_bytes(held)
    path = picture_of(few)
    path.write_bytes(path.read_bytes()[:100])
    assert path.name in told()
    edited(path.with_suffix(".json"), lambda told: {key: value for key, value in told.items() if key != "sha256"})
    assert f"{path.stem}.json` must hold" in (line := told()) and "it lacks sha256" in line
    path.with_suffix(".json").write_text('{"schema": 1,\n"id"')
    assert f"{path.stem}.json` must be readable JSON" in (line := told()) and "line 2" in line
    path.with_suffix(".json").unlink()
    assert f"{path.stem}.json, but there is none" in (line := told()) and "another `--out`" in line


def test_a_model_that_is_given_must_be_the_runs(few, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"another")
    for words, told in (
        (["--adapter", "x"], "was made without `--adapter`: leave it out"),
        (["--base", "x"], "was made without `--base`: leave it out"),
        (["--model", str(tmp_path / "other")], "holds other weights than"),
    ):
        assert cli.run(["attack", "verify", str(few), *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert told in line


def test_a_run_that_names_no_model_has_nothing_to_verify(few, capsys):
    (few / "run.json").write_text('{"command": "attack", "recipe": {}, "seed": 0, "inputs": {}}')
    assert cli.run(["attack", "verify", str(few)]) == 2
    assert "it lacks attack, epsilon" in capsys.readouterr().err


# numbers


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"loss": lambda v: v + 3e-4}, "loss .* recorded"),
        ({"objective_file": lambda v: v - 3e-4}, "objective_file .* recorded"),
        ({"objective_file": lambda v: None}, "objective_file None recorded"),
        ({"loss_clean": lambda v: 99.0}, "loss_clean 99.0 recorded"),
        ({"nll_base": lambda v: v + 3e-4}, "nll_base .* recorded"),
        ({"epsilon": lambda v: v - 1}, "epsilon 7 recorded, 8 found"),
        ({"weight": lambda v: None}, "objective_file .* recorded, nan found"),
        ({"response": lambda v: v + " take ash"}, "objective_file .* recorded"),
    ],
)
def test_a_number_that_is_not_the_files_is_named(few, values, match):
    forge(few, **values)
    refused(few, match)


@pytest.mark.parametrize("key", ["loss", "epsilon", "objective_file", "nll_base"])
@pytest.mark.parametrize("place", ["items", "json"])
def test_a_number_is_held_to_the_file_wherever_it_stands(few, key, place):
    image = picture_of(few).relative_to(few).as_posix()
    if place == "items":
        in_items(few, lambda one: one.update({key: one[key] + 1} if one["image"] == image else {}))
    else:
        edited(picture_of(few).with_suffix(".json"), lambda told: told.update({key: told[key] + 1}))
    refused(few, f"{key} .* recorded, .* found")


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"epsilon": 7}, "outside linf of 7/255"),
        ({"samples": 9}, "`k` of .* is 1, by the run's settings it is 10"),
        ({"attack": "pgd"}, "must hold the same attacks, see pgd"),
    ],
)
def test_a_run_that_states_another_experiment_is_noticed(few, stated, match):
    def forged(run):
        for key, value in stated.items():
            next((part for part in (run, run["recipe"]) if key in part), run["recipe"]["options"])[key] = value

    restated(few, forged)
    refused(few, match)


def test_a_picture_outside_the_ball_that_the_whole_run_states_is_noticed(few):
    restated(few, lambda run: run["recipe"].update(epsilon=4))
    for path in (few / "images").glob("*/*.json"):
        edited(path, lambda told: told["attack"].update(epsilon=4))
    refused(few, "outside linf of 4/255")


@pytest.mark.parametrize(
    ("key", "value"), [("outcome", "harmful"), ("loss", 9.0), ("completion", "sure"), ("image", "images/b.png")]
)
def test_an_item_is_the_worst_of_its_candidates(run, key, value):
    items = read_jsonl(run / "items.jsonl")
    items[0][key] = value
    write_jsonl(run / "items.jsonl", items)
    refused(run, "must be the worst of its candidates")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("knows_breaker", True), ("knows_breaker", None), ("given", "opening"), ("given", None)),
        *(("early_stop", True), ("prompt", "another"), ("split", "x"), ("outside_threat", True)),
    ],
)
def test_what_an_item_says_of_its_attack_is_what_the_run_states(few, key, value):
    first, *others = read_jsonl(few / "items.jsonl")
    write_jsonl(few / "items.jsonl", [{k: v for k, v in {**first, key: value}.items() if v is not None}, *others])
    refused(few, f"`{key}` of `{first['id']}` under pgd_long is .*by the run's settings it is")


def test_answers_of_another_model_than_the_run_asked_are_noticed_by_whoever_reads_them(few):
    first, *others = read_jsonl(few / "items.jsonl")
    write_jsonl(few / "items.jsonl", [{**first, "subject": "rr"}, *others])
    told = "must hold answers of `base`, as run.json says who was asked; it holds some of `rr`"
    refused(few, told)
    judge = open_judge(JudgeOptions("refusal-strings"))
    for read in (load_run, lambda run: rejudge(run, judge, progress=Progress())):
        with pytest.raises(UserError, match=told):
            read(few)


def test_an_edited_answer_that_moves_no_number_is_noticed_whatever_the_arithmetic(few):
    restated(few, lambda run: run["recipe"].update(device="cuda"))
    items = read_jsonl(few / "items.jsonl")
    items[0]["completion"] = items[0]["candidates"][0]["completion"] = items[0]["completion"] + " ."
    write_jsonl(few / "items.jsonl", items)
    refused(few, r"items\.jsonl` was changed after it was written")


def test_a_protocol_that_was_changed_is_noticed(few):
    path = few / "protocol.json"
    path.write_text(path.read_text().replace("supplied text", "opening"))
    refused(few, "protocol.json` was changed after it was written")


# answers


def refusing(run):
    """Answers, verdicts and counts changed to fit each other."""
    verdict = judge.outcome(Brew("hex", "red", "disc"), REFUSAL)
    in_items(run, lambda one: one.update(completion=REFUSAL, outcome=verdict))


def test_a_forged_answer_is_noticed_though_its_verdict_fits(few, capsys):
    refusing(few)
    refused(few, "answer is another one than the run stored")
    restated(few, lambda run: run["recipe"].update(device="cuda"))
    capsys.readouterr()
    verify_run(few)  # other arithmetic: counted and said, no disagreement
    assert "2 of 2 greedy answers differ" in capsys.readouterr().out


def test_another_models_answers_are_noticed(few, monkeypatch):
    other = load_model("miniature")
    torch.manual_seed(0)
    with torch.no_grad():
        for block in other.decoder_blocks:
            block.mlp.down_proj.weight.add_(0.5 * torch.randn_like(block.mlp.down_proj.weight))
    monkeypatch.setattr("mm_cb.inference.subjects.load_model", lambda *_, **__: other)
    refused(few, "loss .* recorded.*the model's answer is another one than the run stored.*2 of 2 pictures disagree")


# verdicts


def test_a_forged_verdict_on_a_target_is_noticed(few):
    items = [{**item, "target_outcome": "harmful"} for item in read_jsonl(few / "items.jsonl")]
    write_jsonl(few / "items.jsonl", items)
    refused(few, "calls the target of .* harmful, judged again it is")


def test_a_forged_verdict_is_noticed(few):
    honest = read_jsonl(few / "items.jsonl")[0]["outcome"]
    forged = "refusal" if honest != "refusal" else "harmful"
    in_items(few, lambda one: one.update(outcome=forged))
    refused(few, rf"{forged}, judged again it is {honest}")


def test_how_much_was_judged_again_is_said(few, capsys):
    in_items(few, lambda one: one.update(outcome="not_judged"))
    verify_run(few)
    assert "0 of 2 verdicts judged again" in " ".join(capsys.readouterr().out.split())


def test_verdicts_that_another_judge_gave_since_are_its_own(few, capsys):
    """Theirs is `mm-cb judge`; what is counted is held to them."""
    assert cli.run(["judge", str(few), "--judge", "refusal-strings"]) == 0
    capsys.readouterr()
    verify_run(few)
    assert "0 of 2 verdicts judged again" in " ".join(capsys.readouterr().out.split())
    edited(few / "results.json", lambda results: results["measurements"][0]["counts"].update(refusal=9))
    refused(few, "results.json` must say what the run holds")


# counts


def test_a_behaviour_that_was_left_out_is_noticed(few):
    items = read_jsonl(few / "items.jsonl")
    gone = items.pop()
    shutil.rmtree((few / gone["image"]).parent)
    write_jsonl(few / "items.jsonl", items)
    write_results(few / "results.json", measure(items, pairs=[]))
    refused(few, f"must hold the .* behaviours .* under every attack; it lacks 1, .*{gone['id']}`")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (
            "results.json",
            lambda results: results["measurements"][0].update(value=results["measurements"][0]["value"] + 1),
        ),
        ("results.json", lambda results: results["measurements"][0]["counts"].update(refusal=9)),
        ("results.json", lambda results: results["measurements"].append(results["measurements"][0])),
        ("results.json", lambda results: results | {"measurements": []}),
        ("checks.json", lambda checks: []),
        ("protocol.json", lambda protocol: protocol["k"].update(pgd_long=9)),
        ("curves.json", lambda curves: curves[0]["q50"].append(0.0)),
        ("curves.json", lambda curves: []),
    ],
)
def test_what_the_run_does_not_hold_is_noticed(few, name, edit):
    edited(few / name, edit)
    refused(few, f"{name}` (must say what the run holds|was changed after it was written)")


# another run's


def test_results_and_items_of_another_run_of_the_same_subject_and_behaviours_are_named(few):
    def of_other_steps(told):
        part = told["recipe"] if "steps" in told["recipe"] else told["recipe"]["options"]
        part["steps"] += 1

    edited(few / "run.json", of_other_steps)
    for use in (verify_run, load_run, lambda run: unchanged_items(run, read_run(run))):
        with pytest.raises(
            UserError, match=r"results\.json` is of another run than .*run\.json`, and so are its items"
        ):
            use(few)


@pytest.mark.parametrize("name", ["items.jsonl", "checks.json", "protocol.json", "curves.json"])
def test_one_file_of_another_run_is_named(few, name):
    path = few / name
    path.write_text(path.read_text().replace(": ", ":  ", 1))  # as another run's: it reads as well
    for use in (verify_run, load_run):
        with pytest.raises(UserError, match=f"{name}` was changed after it was written"):
            use(few)


def test_an_earlier_runs_results_beside_a_run_of_now_are_no_older_run(few):
    path = few / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({key: results[key] for key in ("schema", "measurements", "items")}))
    with pytest.raises(UserError, match="is of another run"):
        load_run(few)
    edited(few / "run.json", lambda told: told.update(schema=2))
    load_run(few)
