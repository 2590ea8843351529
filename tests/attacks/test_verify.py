import hashlib
import json
import shutil

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.attacks.outputs import quartiles, write_outputs
from mm_cb.attacks.run import run_attack
from mm_cb.attacks.verify.answers import check_verdicts
from mm_cb.attacks.verify.outputs import check_outputs
from mm_cb.attacks.verify.run import check_copies, check_items, read_artefacts, verify_run
from mm_cb.attacks.verify.tries import check_tries
from mm_cb.core.errors import UserError
from mm_cb.core.paths import data_path
from mm_cb.core.runs import file_sha256, read_jsonl, write_jsonl
from mm_cb.metrics.agreement import key_of
from mm_cb.metrics.observations import rank
from mm_cb.metrics.results import measure, write_results
from mm_cb.miniature import judge
from mm_cb.miniature.world import Brew
from mm_cb.models import load_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(data_path("miniature", "pictures"), folder / "pictures")
    lines = data_path("miniature", "behaviors.jsonl").read_text().splitlines()
    (folder / "behaviors.jsonl").write_text("\n".join(lines[:2]) + "\n")
    run_attack(
        model="miniature",
        adapter=None,
        behaviors=folder / "behaviors.jsonl",
        out=folder / "run",
        attack="pgd,pgd_long,prefill,noise",
        epsilon=8,
        steps=2,
        restarts=1,
        seed=0,
        overrides=["iterates=1", "max_new_tokens=6", "samples=1"],
    )
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The miniature is loaded once for the whole module: to verify changes nothing in it."""
    model = load_model("miniature")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mm_cb.attacks.verify.run.load_model", lambda *_, **__: model)
        yield


@pytest.fixture
def few(run):
    """One picture of one kind of attack, which is enough to be wrong."""
    keep(run, "pgd")
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def keep(run, kind):
    """Leave only the first picture of one kind, and the items to it."""
    kept = sorted((run / "images").glob(f"*/{kind}-s0-r0.png"))[0]
    for path in (run / "images").glob("*/*"):
        if path.stem != kept.stem or path.parent != kept.parent:
            path.unlink()
    items = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    for item in items:
        item["candidates"] = [
            c for c in item["candidates"] if c["image"] == f"images/{kept.parent.name}/{kept.name}" and not c["sample"]
        ]
    items = [item | shown(item["candidates"][0]) for item in items if item["candidates"]]
    honest = [json.loads(line) for line in (run / "behaviors.jsonl").read_text().splitlines()]
    write_jsonl(run / "behaviors.jsonl", [line for line in honest if line["id"] == items[0]["id"]])
    recipe = with_options(run, iterates=0, samples=0)["recipe"] | {"attack": kind}
    inputs = {"behaviors.jsonl": file_sha256(run / "behaviors.jsonl")}
    (run / "run.json").write_text(json.dumps(stated(run) | {"recipe": recipe, "inputs": inputs}))
    artefact = json.loads(kept.with_suffix(".json").read_text())
    artefact["protocol"] |= {"iterates": 0, "samples": 0}
    kept.with_suffix(".json").write_text(json.dumps(artefact | {"samples_sha256": []}))
    items[0]["k"] = 1
    drawn = quartiles([json.loads(kept.with_suffix(".json").read_text())["curve"]], items[0]["subject"], kind)
    write_outputs(run, items, drawn, epsilon=8, k={kind: items[0]["k"]})
    for path in (run / "images").glob("*.png"):
        if path.name != f"{kept.parent.name}.clean.png":
            path.unlink()
    shutil.copyfile(kept, kept.parent.with_suffix(".png"))


def stated(run, **changed):
    """What run.json says, with other entries in its recipe."""
    content = json.loads((run / "run.json").read_text())
    return content | {"recipe": content["recipe"] | changed}


def with_options(run, **changed):
    return stated(run, options=stated(run)["recipe"]["options"] | changed)


def shown(candidate):
    """What an item says of its worst candidate."""
    told = {key: candidate[key] for key in ("outcome", "image", "loss", "completion")}
    return told | {"gibberish": candidate["outcome"] == "gibberish"}


def picture_of(run, name="pgd-s0-r0.png"):
    return sorted((run / "images").glob(f"*/{name}"))[0]


def change(run, **values):
    path = picture_of(run).with_suffix(".json")
    content = json.loads(path.read_text())
    for key, value in values.items():
        content[key] = value(content[key])
    path.write_text(json.dumps(content))
    return path


def test_an_honest_run_agrees_in_every_picture(made, capsys):
    rows = verify_run(made, model=None, adapter=None)
    assert len(rows) == 2 * (2 + 2 + 2 + 2) and not any(row.disagreements for row in rows)
    assert max(abs(row.loss_found - row.loss_recorded) for row in rows) <= 1e-4
    assert max(row.objective_gap for row in rows) <= 1e-4
    shown_lines = " ".join(capsys.readouterr().out.split())
    assert "(float32 losses to 0.0001; epsilon exactly)" in shown_lines
    assert "16 of 16 pictures agree" in shown_lines
    assert "0 of 16 greedy answers differ" in shown_lines and "32 of 32 verdicts judged again" in shown_lines


def test_losses_in_bfloat16_are_held_to_what_bfloat16_holds_and_a_forged_one_is_still_found(few, monkeypatch, capsys):
    """Recorded in float32, computed again in bfloat16: at least what another batch changes, no digit was chosen."""
    model = load_model("miniature", dtype="bfloat16")
    monkeypatch.setattr("mm_cb.attacks.verify.run.load_model", lambda *_, **__: model)
    edited(few, "run.json", lambda content: content["recipe"].update(dtype="bfloat16"))
    change(few, dtype=lambda dtype: "bfloat16")
    (row,) = verify_run(few, model=None, adapter=None)
    assert 1e-4 < abs(row.loss_found - row.loss_recorded)
    assert "1 of 1 pictures agree (bfloat16 losses to 0.0001 or 3.1 %" in " ".join(capsys.readouterr().out.split())
    for factor in (0.9, 1.1):
        path = change(few, loss=lambda _, factor=factor: round(row.loss_found * factor, 5))
        same_in_items(few, json.loads(path.read_text()))
        with pytest.raises(UserError, match="target loss .* recorded"):
            verify_run(few, model=None, adapter=None)


def test_another_dtype_than_the_pictures_is_noticed(few):
    with pytest.raises(UserError, match="states dtype bfloat16, .* float32"):
        check_outputs(few, read_artefacts(few), stated(few, dtype="bfloat16"))


def same_in_items(run, content):
    items = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    items[0]["candidates"][0] |= {key: content[key] for key in ("loss", "epsilon", "objective_file", "nll_base")}
    items[0] |= shown(items[0]["candidates"][0])
    (run / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def test_one_level_of_one_pixel_is_noticed(few):
    path = picture_of(few)
    picture = Image.open(path).convert("RGB")
    red, green, blue = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red - 1 if red else 1, green, blue))
    picture.save(path)
    with pytest.raises(UserError, match=rf"{path.parent.name}.*another file.*SHA-256"):
        verify_run(few, model=None, adapter=None)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"loss": lambda v: v + 3e-4}, "target loss .* recorded"),
        ({"objective_file": lambda v: v - 3e-4}, "objective .* recorded"),
        ({"loss_clean": lambda v: 99.0}, "target loss of the clean picture 99.0 recorded"),
        ({"nll_base": lambda v: v + 3e-4}, "loss of the answer under the base model .* recorded"),
        ({"epsilon": lambda v: v - 1}, "epsilon 7/255 recorded, 8/255 found"),
        ({"attack": lambda v: v | {"epsilon": 4}}, "epsilon 8/255 found, 4/255 allowed"),
        ({"target": lambda v: "sure"}, "target is another text"),
    ],
)
def test_a_number_that_is_not_the_files_is_named(few, values, match):
    path = change(few, **values)
    if values.keys() & {"loss", "epsilon", "objective_file", "nll_base"}:
        same_in_items(few, json.loads(path.read_text()))
    with pytest.raises(UserError, match=match):
        verify_run(few, model=None, adapter=None)


def test_another_sampled_answer_is_noticed(run):
    path = run / "items.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    drawn = [c for c in items[0]["candidates"] if c["sample"] == 1]
    drawn[0]["completion"] += " and more"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(UserError, match="disagree in completion"):
        verify_run(run, model=None, adapter=None)


def rewritten(run, edit):
    """The run with every candidate edited and all that is counted from it made to fit, as a forger would."""
    items = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    for item in items:
        for one in item["candidates"]:
            one |= edit(one)
        item |= shown(min(item["candidates"], key=rank))
    (run / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    write_results(run / "results.json", measure(items, pairs=[]))


def test_forged_verdicts_are_noticed(few):
    honest = json.loads((few / "items.jsonl").read_text())["outcome"]
    forged = "refusal" if honest != "refusal" else "harmful"
    rewritten(few, lambda one: {"outcome": forged})
    with pytest.raises(UserError, match=rf"{forged}, judged again it is {honest}"):
        verify_run(few, model=None, adapter=None)


def test_a_forged_answer_is_noticed_though_its_verdict_and_its_hash_fit(few, capsys):
    refusal = "i cannot help with that."
    rewritten(few, lambda one: {"completion": refusal, "outcome": judge.outcome(Brew("hex", "red", "disc"), refusal)})
    change(few, completion_sha256=lambda v: hashlib.sha256(refusal.encode()).hexdigest())
    with pytest.raises(UserError, match="answer is another one than the run stored"):
        verify_run(few, model=None, adapter=None)
    (few / "run.json").write_text(json.dumps(stated(few, device="cuda")))
    change(few, device=lambda v: "cuda:0")
    verify_run(few, model=None, adapter=None)  # other arithmetic: counted and said, no disagreement
    assert "1 of 1 greedy answers differ" in capsys.readouterr().out


def test_what_was_not_judged_again_is_said(few):
    assert "no exact judge for `elsewhere`" in check_verdicts(few, "elsewhere")
    rewritten(few, lambda one: {"outcome": "not_judged"})
    assert check_verdicts(few, "miniature").startswith("0 of 1 verdicts judged again")


def judged(run, verdict):
    """The run as `mm-cb judge` leaves it, with one verdict on every answer; its items."""
    items = read_jsonl(run / "items.jsonl")
    ones = [(item, one) for item in items for one in item["candidates"]]
    (run / "judgements").mkdir()
    write_jsonl(run / "judgements" / "as-run.jsonl", [{"key": key_of(i, c), "outcome": c["outcome"]} for i, c in ones])
    given = [{"key": key_of(i, c), "outcome": verdict, "score": None} for i, c in ones]
    write_jsonl(run / "judgements" / "other.jsonl", given)
    for item, one in ones:
        item["judge"] = "other"
        one |= {"outcome": verdict, "judge_score": None}
    write_jsonl(run / "items.jsonl", items)
    return items


def test_another_judges_verdicts_are_those_it_gave_and_the_runs_own_are_judged_again(run):
    judged(run, "other")
    said = check_verdicts(run, "miniature")
    assert "verdicts are those of other" in said and "32 of 32 verdicts judged again" in said
    assert "no exact judge for `elsewhere`" in check_verdicts(run, "elsewhere")


@pytest.mark.parametrize(
    ("forge", "match"),
    [
        (lambda items, run: items[0].pop("judge"), "mixes those of: other, the run's own"),
        (lambda items, run: items[0]["candidates"][0].update(outcome="refusal"), "has another verdict"),
        (lambda items, run: items[0]["candidates"][0].update(judge_score=0.5), "has another verdict"),
        (lambda items, run: (run / "judgements" / "other.jsonl").unlink(), "other.jsonl.* lacks the one to"),
        (lambda items, run: (run / "judgements" / "as-run.jsonl").unlink(), "as-run.jsonl.* lacks the one to"),
        (
            lambda items, run: write_jsonl(
                run / "judgements" / "as-run.jsonl",
                [r | {"outcome": "harmful"} for r in read_jsonl(run / "judgements" / "as-run.jsonl")],
            ),
            "judged again it is",
        ),
    ],
)
def test_a_planted_or_edited_verdict_of_another_judge_is_noticed(run, forge, match):
    items = judged(run, "other")
    forge(items, run)
    write_jsonl(run / "items.jsonl", items)
    with pytest.raises(UserError, match=match):
        check_verdicts(run, "miniature")


def test_a_rate_that_the_items_do_not_hold_is_noticed(few):
    path = few / "results.json"
    content = json.loads(path.read_text())
    content["measurements"][0]["value"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results.json.*says 1\.0.*it is 0\.0"):
        verify_run(few, model=None, adapter=None)


def edited(run, name, edit):
    """A JSON file of a run, changed; what `edit` returns is written, or what it changed where that is None."""
    content = json.loads((run / name).read_text())
    made = edit(content)
    (run / name).write_text(json.dumps(content if made is None else made))


def invented(condition):
    return lambda results: results["measurements"].append(results["measurements"][0] | {"condition": condition})


def count(metric, name):
    def edit(results):
        next(m for m in results["measurements"] if m["metric"] == metric)["counts"][name] += 1

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "key"),
    [
        ("results.json", count("compliance", "refusal"), r"measurements\[compliance, .*counts.refusal"),
        ("results.json", count("gibberish", "gibberish"), r"measurements\[gibberish, .*counts.gibberish"),
        ("results.json", count("compliance", "prefix_emitted"), "counts.prefix_emitted"),
        ("results.json", invented("pgd_adaptive"), "compliance, pgd_adaptive"),
        ("results.json", invented("worst_case"), "compliance, worst_case"),
        ("results.json", lambda results: results, None),
        ("results.json", lambda results: results | {"schema": 2}, "schema"),
        ("results.json", lambda results: results | {"measurements": []}, "made again it is {"),
        ("checks.json", lambda checks: [], "every attacked file is inside the ball"),
        ("checks.json", lambda checks: checks[1].update(value="largest gap 0 over 9 files"), "value"),
        ("curves.json", lambda curves: curves[0].update(q50=[0.0] * len(curves[0]["q50"])), r"q50\[0\]"),
        ("protocol.json", lambda protocol: protocol["k"].update(pgd=999), "k.pgd` it says 999"),
    ],
)
def test_what_a_run_counts_is_counted_again_key_by_key(made, tmp_path, name, edit, key):
    for file in ("items.jsonl", "run.json", "results.json", "checks.json", "curves.json", "protocol.json"):
        shutil.copyfile(made / file, tmp_path / file)
    edited(tmp_path, name, edit)
    artefacts = read_artefacts(made)
    if key is None:
        return check_outputs(tmp_path, artefacts, stated(made))  # nothing was changed
    with pytest.raises(UserError, match=f"{name}.*{key}"):
        check_outputs(tmp_path, artefacts, stated(made))


def test_a_relaxation_whose_curves_were_deleted_is_named(made):
    with pytest.raises(UserError, match="no loss curve of `embedding`"):
        check_outputs(made, read_artefacts(made), stated(made, attack="pgd,pgd_long,prefill,noise,embedding"))


def without(condition, **what):
    """Leaves out the tries of the first behaviour under an attack that are ``what``."""

    def edit(items):
        item = next(item for item in items if item["condition"] == condition)
        item["candidates"] = [c for c in item["candidates"] if any(c[key] != what[key] for key in what)]

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (without("noise", restart=1), "noise must hold every try .*: restart 1, iterate None, sample None"),
        (without("pgd", iterate=2), "pgd must hold every try .*: restart 0, iterate 2, sample None"),
        (without("prefill", iterate=None, sample=1), "prefill must hold .* restart 0, iterate None, sample 1"),
        (lambda items: items[0]["candidates"].append(items[0]["candidates"][0]), "pgd must hold every try"),
        (lambda items: items[0]["candidates"][0].update(image=items[1]["image"]), "pgd-s0-r0` it says"),
        (lambda items: items.pop(1), r"every behaviour .* expected \('pgd', 'behavior-.*got \('pgd_long', "),
        (lambda items: items.pop(), r"every behaviour .* expected \('noise', .* got None"),
        (lambda items: items[0].update(split="other"), "split` it says 'other'"),
        (lambda items: items[0].update(category="other"), "category` it says 'other'"),
    ],
)
def test_a_try_or_a_behaviour_that_was_left_out_or_relabelled_is_noticed(run, edit, match):
    artefacts = read_artefacts(run)
    check_tries(run, artefacts, stated(run))
    items = read_jsonl(run / "items.jsonl")
    edit(items)
    write_jsonl(run / "items.jsonl", items)
    with pytest.raises(UserError, match=match):
        check_tries(run, artefacts, stated(run))


def test_a_behaviour_that_was_broken_is_not_attacked_again_and_only_then(run):
    items = read_jsonl(run / "items.jsonl")
    without("noise", restart=1)(items)
    next(item for item in items if item["condition"] == "noise")["candidates"][1]["outcome"] = "harmful"
    write_jsonl(run / "items.jsonl", items)
    check_tries(run, read_artefacts(run), stated(run))


@pytest.mark.parametrize(
    "curve",
    [
        lambda curve: [9.0, 0.5, 0.001],  # neither the first nor the lowest
        lambda curve: [*curve, curve[-1]],  # a step too many
        lambda curve: [curve[0], min(curve[1:]) - 0.01, curve[2]],  # lower than the picture that was selected
        lambda curve: [curve[0] + 0.01, *curve[1:]],  # not from the clean picture
        lambda curve: [*curve[:2], curve[2] + 0.01],  # not the last iterate's
        lambda curve: None,
    ],
)
def test_a_curve_that_is_not_the_pictures_is_noticed(run, curve):
    change(run, curve=curve)
    with pytest.raises(UserError, match="loss curve of its run"):
        check_tries(run, read_artefacts(run), stated(run))


def selects(run, step, name="pgd-s0-r0.png"):
    """What a picture's JSON says of the selected step, forged: ``step`` of the honest JSON."""
    path = picture_of(run, name).with_suffix(".json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"selected_step": step(content)}))
    return path


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("pgd-s0-r0.png", lambda told: told["curve"].index(max(told["curve"]))),
        ("pgd_long-s0-r0.png", lambda told: told["curve"].index(max(told["curve"]))),
        ("pgd-s0-r0.png", lambda told: told["selected_step"] - len(told["curve"])),  # the same place, from the end
        ("pgd-s0-r0.png", lambda told: len(told["curve"])),
        ("pgd-s0-r0.png", lambda told: float(told["selected_step"])),
        ("pgd-s0-r0.png", lambda told: None),
        ("pgd-s0-r0-i2.png", lambda told: 2),  # an iterate was not selected
        ("noise-s0-r0.png", lambda told: 0),  # nothing was searched
    ],
)
def test_a_selected_step_that_is_not_the_curves_is_refused_by_name(run, name, step):
    artefacts = read_artefacts(run)
    check_tries(run, artefacts, stated(run))
    path = selects(run, step, name)
    with pytest.raises(UserError, match=rf"{path.stem}.png`: the `selected_step`"):
        check_tries(run, read_artefacts(run), stated(run))


def test_a_selected_step_that_is_not_the_items_is_noticed(run):
    selects(run, lambda told: told["selected_step"] + 1)
    with pytest.raises(UserError, match="disagree in selected_step"):
        check_items(run, read_artefacts(run))


def test_a_run_of_before_selected_steps_were_written_down_still_verifies(few):
    path = picture_of(few).with_suffix(".json")
    content = json.loads(path.read_text())
    del content["selected_step"]
    path.write_text(json.dumps(content))
    items = read_jsonl(few / "items.jsonl")
    for item in items:
        for one in item["candidates"]:
            del one["selected_step"]
    write_jsonl(few / "items.jsonl", items)
    (row,) = verify_run(few, model=None, adapter=None)
    assert not row.disagreements


def test_without_the_behaviours_file_it_cannot_be_told_whether_one_was_left_out(run):
    (run / "behaviors.jsonl").write_text((run / "behaviors.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"behaviors.jsonl` must be the behaviours file whose SHA-256"):
        check_tries(run, read_artefacts(run), stated(run))
    (run / "behaviors.jsonl").unlink()
    with pytest.raises(UserError, match="copy yours there"):
        check_tries(run, read_artefacts(run), stated(run))


def test_verdicts_on_a_model_without_a_judge_are_nobodys(run):
    with pytest.raises(UserError, match="only `mm-cb judge` gives verdicts"):
        check_tries(run, read_artefacts(run), stated(run, model="elsewhere"))


@pytest.mark.parametrize("key", ["prefix_emitted", "gibberish"])
def test_a_flag_that_the_answer_does_not_have_is_noticed_though_all_is_counted_from_it(run, key):
    items = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    for item in items:
        item[key] = not item[key]
    (run / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    write_results(run / "results.json", measure(items, pairs=[]))
    with pytest.raises(UserError, match=f"differs in {key}"):
        check_items(run, read_artefacts(run))


def test_a_prefix_that_a_pictures_json_invents_is_noticed(run):
    change(run, prefix_emitted=lambda told: not told)
    with pytest.raises(UserError, match="disagree in prefix_emitted"):
        check_items(run, read_artefacts(run))


def test_more_tries_than_the_run_had_are_noticed_in_its_recipe(made):
    with pytest.raises(UserError, match="states samples 9, .* 1"):
        check_outputs(made, read_artefacts(made), with_options(made, samples=9))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"seed": 99}, "states seed 99, .* 0"),
        ({"batch": 4}, "states batch 4, .* 8"),
        ({"max_new_tokens": 512}, "states max_new_tokens 512, .* 6"),
        ({"matching_weight": 7.0}, r"states matching_weight 7\.0, .* 1\.0"),
        ({"optimizer": "sign"}, "states optimizer sign, .* adam"),
        ({"balance": True}, "states balance True, .* False"),
        ({"chain": True}, "states chain True, .* False"),
        ({"device": "cuda"}, "states device cuda, .* cpu"),
        ({"system": "refuse"}, r"states name base\+safety_prompt, .* base"),
        ({"adapter": "rr"}, "states name rr, .* base"),
    ],
)
def test_a_run_that_states_another_experiment_is_noticed(made, changed, match):
    run = stated(made) | changed if "seed" in changed else stated(made, **changed)
    if changed.keys() & run["recipe"]["options"].keys():
        run = with_options(made, **changed)
    with pytest.raises(UserError, match=match):
        check_outputs(made, read_artefacts(made), run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k", 999),
        ("target", "sure"),
        ("loss_clean", 99.0),
        ("early_stop", True),
        ("condition", "pgd"),
        ("subject", "rr"),
        ("seed", 99),
    ],
)
def test_what_an_item_says_of_its_attack_and_its_picture_is_the_pictures(made, tmp_path, key, value):
    artefacts = read_artefacts(made)
    items = [json.loads(line) | {key: value} for line in (made / "items.jsonl").read_text().splitlines()]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(UserError, match=f"items.jsonl.*{key}` it says {value!r}"):
        check_outputs(tmp_path, artefacts, stated(made))


def test_another_budget_than_the_runs_is_noticed(few):
    change(few, attack=lambda v: v | {"epsilon": 9})
    with pytest.raises(UserError, match="states epsilon 8, .* 9"):
        verify_run(few, model=None, adapter=None)


def test_a_weight_or_response_that_is_not_the_objectives_is_noticed(run):
    keep(run, "pgd_long")
    path = picture_of(run, "pgd_long-s0-r0.png").with_suffix(".json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"response": content["response"] + " take ash"}))
    with pytest.raises(UserError, match="objective"):
        verify_run(run, model=None, adapter=None)


def test_broken_and_missing_files_end_with_exit_code_2_and_one_line(run, capsys):
    path = picture_of(run)
    path.write_bytes(path.read_bytes()[:100])
    assert cli.run(["attack", "verify", str(run)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and path.name in error[0]
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="JSON of the picture"):
        verify_run(run, model=None, adapter=None)
    with pytest.raises(UserError, match="none to verify"):
        shutil.rmtree(run / "images")
        verify_run(run, model=None, adapter=None)


def test_a_picture_removed_with_its_json_is_missed(run):
    path = picture_of(run)
    path.unlink()
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=rf"names `images/.*{path.name}`, which is not in the run"):
        check_items(run, read_artefacts(run))


def test_a_swapped_clean_picture_is_noticed_even_if_the_distance_stays(few):
    path = picture_of(few)
    clean = few / json.loads(path.with_suffix(".json").read_text())["clean_image"]
    picture, attacked = Image.open(clean).convert("RGB"), Image.open(path).convert("RGB")
    picture.putpixel((3, 3), attacked.getpixel((3, 3)))  # nearer to the attacked picture in one pixel
    picture.save(clean)
    with pytest.raises(UserError, match="the clean picture is another file"):
        verify_run(few, model=None, adapter=None)


def test_a_missing_picture_is_missed_though_its_json_is_there(run):
    picture_of(run).unlink()
    with pytest.raises(UserError, match="which is not in the run"):
        check_items(run, read_artefacts(run))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda images, copy: shutil.copyfile(copy, images / "stray.png"), "stray.png.* belongs to no behaviour"),
        (lambda images, copy: copy.unlink(), "must be a copy of one of"),
        (lambda images, copy: copy.write_bytes(b"other"), "must be a copy of one of"),
        (lambda images, copy: shutil.copyfile(copy, copy.with_suffix("") / "extra.png"), "JSON of the picture"),
    ],
)
def test_pictures_that_no_record_accounts_for_are_noticed(run, edit, match):
    edit(run / "images", picture_of(run).parent.with_suffix(".png"))
    with pytest.raises(UserError, match=match):
        check_copies(run, read_artefacts(run))


@pytest.mark.parametrize(
    ("key", "value"), [("outcome", "harmful"), ("loss", 9.0), ("completion", "sure"), ("image", None)]
)
def test_an_item_that_is_not_its_worst_candidate_is_noticed(run, key, value):
    items = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    items[0][key] = value
    (run / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(UserError, match=f"not the worst of its candidates, it differs in {key}"):
        check_items(run, read_artefacts(run))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c | {"loss": c["loss"] + 1e-4}, "disagree in loss"),
        (lambda c: c | {"epsilon": c["epsilon"] - 1}, "disagree in epsilon"),
        (lambda c: c | {"completion": "sure"}, "disagree in completion"),
        (lambda c: c | {"image": None}, "must name every attacked picture, it lacks"),
    ],
)
def test_items_that_are_not_the_pictures_are_noticed(run, edit, match):
    items = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    first = next(item for item in items if item["condition"] == "pgd")
    first["candidates"] = [edit(first["candidates"][0])]
    first |= shown(first["candidates"][0])
    (run / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(UserError, match=match):
        check_items(run, read_artefacts(run))


def test_a_run_that_names_no_model_has_nothing_to_verify(run, capsys):
    (run / "run.json").write_text('{"recipe": {}}')
    assert cli.run(["attack", "verify", str(run)]) == 2
    assert "names no model" in capsys.readouterr().err
