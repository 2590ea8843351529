"""A run that did nothing says so, in every place, and names the setting that moves it."""

import json
import re
import shlex
import warnings
from types import SimpleNamespace

import pytest

from mm_cb import cli
from mm_cb.core.files import file_sha256
from mm_cb.report.combine import _did_not_take_hold
from mm_cb.training.outcome import ENOUGH_STEPS, DidNotTakeHold, Levers, outcome
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.registry import loss_entry, loss_names
from mm_cb.training.run import train
from mm_cb.training.trainer import ReroutingTrainer
from tests.models.conftest import save_text_model

PAPER, OURS = Levers("absolute", 0.0, 150, 150, 1e-4), Levers("relative", 0.15, 150, 150, 1e-4)
FAR = {"held_out_circuit_breaker_cosine": 0.1, "held_out_retain_cosine": 0.99, "step": 149}


def test_a_run_that_rerouted_and_kept_has_nothing_wrong():
    assert outcome(loss_entry("rr"), FAR, PAPER) is None


@pytest.mark.parametrize(
    ("levers", "advice"),
    [
        (PAPER, "circuit_breaker.retain_scale=relative training.start_distance=0.15"),
        (OURS._replace(retain_scale="absolute"), "circuit_breaker.retain_scale=relative"),
        (OURS._replace(start_distance=0.0), "training.start_distance=0.15"),
        (OURS, "circuit_breaker.schedule_steps=1500"),
        (OURS._replace(schedule_steps=1500), "training.learning_rate=0.0003"),
    ],
)
def test_the_setting_that_moves_it_is_named_and_can_be_set(levers, advice):
    found = outcome(loss_entry("rr"), FAR | {"held_out_circuit_breaker_cosine": 0.9998}, levers)
    assert found.startswith(
        "nothing was rerouted: after step 149 the cosine of held-out circuit-breaker rows is 0.9998"
    )
    assert found.endswith(f"; set {advice}")
    load_recipe("mistral-7b-instruct", advice.split())


def test_retain_states_that_went_are_named_beside_and_alone():
    gone = FAR | {"held_out_retain_cosine": 0.62}
    found = outcome(loss_entry("rr"), gone, OURS)
    assert found.startswith("retain states were not kept") and "0.62" in found and "learning_rate=5e-05" in found
    told = outcome(loss_entry("rr"), gone, OURS._replace(openings_rerouted=True))
    assert told.endswith("set circuit_breaker.shared_openings=left_out")
    both = outcome(loss_entry("rr"), gone | {"held_out_circuit_breaker_cosine": float("nan")}, OURS)
    assert "nothing was rerouted" in both and "retain states were not kept" in both


def test_retain_states_that_went_are_told_after_a_fifth_of_the_run():
    run = SimpleNamespace(max_steps=150), SimpleNamespace(should_training_stop=False)
    trainer = SimpleNamespace(state=run[0], control=run[1], _stop_at=None, _warned=False, _levers=lambda: OURS)
    trainer._objective, trainer.is_world_process_zero = SimpleNamespace(loss=loss_entry("rr")), lambda: True
    gone = FAR | {"held_out_retain_cosine": 0.62}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ReroutingTrainer._judged(trainer, gone | {"step": 20}) == {}
    with pytest.warns(UserWarning, match="retain states were not kept: after step 30 .* 119 steps are to come"):
        assert ReroutingTrainer._judged(trainer, gone | {"step": 30}) == {}


def test_every_loss_is_judged_by_a_measure_that_its_log_has():
    for name in loss_names():
        entry = loss_entry(name)
        assert entry.hold.measure in ("cosine", entry.measure[0] if entry.measure else "cosine")
        assert (entry.hold.below is None) != (entry.hold.above is None)


@pytest.fixture(scope="module")
def stuck(tmp_path_factory, examples):
    """Arguments of a run with the paper's start that goes nowhere, and its data's file."""
    folder = tmp_path_factory.mktemp("stuck")
    model = save_text_model(folder / "model", "mistral")
    rows = [e for e in examples if e.modality == "text"]
    lines = [json.dumps({"id": e.id, "messages": e.messages, "images": [], "set": e.set}) + "\n" for e in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    fields = [f"model={model}", f"data=[{folder / 'rows.jsonl'}]", "device=cpu", "dtype=float32"]
    fields += ["circuit_breaker.target_layers=[1]", "lora.layers_to_transform=[0]", "lora.modules=[q_proj]", "lora.r=1"]
    fields += ["circuit_breaker.retain_scale=absolute", "training.start_distance=0", "training.learning_rate=1e-9"]
    fields += ["training.held_out=1", "training.batch_size=1", "training.save_steps=1000"]
    return fields, folder


def test_a_command_that_rerouted_nothing_exits_2_and_its_card_says_so(stuck, capsys):
    fields, folder = stuck
    command = ["train", "mistral-7b-instruct", *fields, "training.max_steps=50", "--out", str(folder / "run")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert cli.run(command) == 2
    out, err = capsys.readouterr()
    message = err.strip().splitlines()[-1]
    again = shlex.split(out.partition("  mm-cb ")[2].partition("  # ")[0].replace("\\\n", ""))
    settings = ["circuit_breaker.retain_scale=relative", "training.start_distance=0.15"]
    kept = [one for one in command[:-1] if one.split("=")[0] not in {setting.split("=")[0] for setting in settings}]
    assert again == [*kept, f"{folder / 'run'}-again", *settings]
    assert "--allow-stuck" in out
    assert "nothing was rerouted" in message and "retain_scale=relative" in message and "--allow-stuck" in message
    early = [str(one.message) for one in said if "no end yet" in str(one.message)]
    assert len(early) == 1 and "after step 10 " in early[0]
    assert not [one for one in said if issubclass(one.category, DidNotTakeHold)]
    assert (folder / "run" / "adapter_model.safetensors").is_file()
    card = (folder / "run" / "README.md").read_text()
    assert "**It did not take hold: nothing was rerouted" in card and "It is to lower" not in card
    assert "median length of the base's states" in card
    run = folder / "run"
    inputs = {"adapter_model.safetensors": file_sha256(run / "adapter_model.safetensors")}
    attacked = SimpleNamespace(run={"recipe": {"adapter": str(run)}, "inputs": inputs})
    assert "did not take hold: nothing was rerouted" in _did_not_take_hold(attacked)
    assert _did_not_take_hold(SimpleNamespace(run={"recipe": {"adapter": str(run)}, "inputs": {}})) is None
    assert cli.run(command) == 2  # finished, and still so
    with pytest.warns(UserWarning, match="nothing was rerouted"):
        assert cli.run([*command, "--allow-stuck"]) == 0


def test_a_dry_run_says_how_it_would_start_where_the_weights_are(stuck, capsys):
    fields = [one.replace("start_distance=0", "start_distance=0.2") for one in stuck[0]]
    assert cli.run(["train", "mistral-7b-instruct", *fields, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "Before the first step: median length of the base's states" in plan and "moves them by 0.2" in plan
    assert "Gradients there, without their weights: reroute loss" in plan


def test_in_python_it_is_a_warning(stuck, tmp_path):
    fields, _ = stuck
    with pytest.warns(DidNotTakeHold, match="nothing was rerouted"):
        train(load_recipe("mistral-7b-instruct", [*fields, "training.max_steps=2"]), tmp_path / "run")


def test_a_short_try_ends_with_one_calm_line(stuck, tmp_path, capsys):
    fields, _ = stuck
    command = ["train", "mistral-7b-instruct", *fields, "training.max_steps=20", "training.held_out_steps=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.run([*command, "--out", str(tmp_path / "run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("20 steps are a try") == 1 and "rerouted" not in out
    assert "Cosine between hidden states with the adapter and without it" in out


def test_the_help_says_from_which_length_on_a_run_can_be_stuck(capsys):
    cli.run(["train", "--help"])
    assert f"from {ENOUGH_STEPS} steps on" in " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
