import json
import os
import random
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration

from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl, read_run
from mm_cb.models import load_model
from mm_cb.models.adapters import own_hashes
from mm_cb.training.card import model_card
from mm_cb.training.checkpoints import last_checkpoint, refuse_changed
from mm_cb.training.inputs import absent_data, load_examples
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train
from mm_cb.training.trainer import ReroutingTrainer
from tests.tiny_llava import picture, tiny_llava

OPTIONS = [
    "circuit_breaker.target_layers=[2]",
    "lora.layers_to_transform=[1]",
    "lora.r=4",
    "training.max_steps=6",
    "training.batch_size=4",
    "training.save_steps=2",
    "training.start_distance=0",
    "training.average_last=0",
    "circuit_breaker.schedule_steps=null",
]


@pytest.fixture
def recipe(model_folder):
    def make(*overrides):
        return load_recipe("miniature", [f"model={model_folder}", *OPTIONS, *overrides])

    return make


class Stop(KeyboardInterrupt):
    pass


class StoppingProgress:
    """A progress display that interrupts the run at a step, and remembers what it was shown."""

    def __init__(self, at=None):
        self.at, self.shown = at, []

    def task(self, description, total, done=0, shorter=""):
        self.done, self.total = done, total
        return self

    def advance(self, n=1, note=""):
        self.done += n
        self.shown.append(note)
        if self.done == self.at:
            raise Stop


@pytest.fixture(scope="session")
def trained(tmp_path_factory, model_folder, examples):
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(load_recipe("miniature", [f"model={model_folder}", *OPTIONS]), out, examples)


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_trained_adapter_knows_its_own_files(trained):
    assert json.loads((trained / "base.json").read_text())["files"] == own_hashes(trained)


def test_a_finished_run_holds_an_adapter_and_nothing_else(trained):
    assert {path.name for path in trained.iterdir()} - {".lock"} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "metrics.jsonl", "run.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in trained.iterdir() if path.name != ".lock"}) == 1
    config = json.loads((trained / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 7 and config["layers_to_transform"] is None
    assert all(path.startswith("model.language_model.layers.1.") for path in config["target_modules"])
    weights = load_file(trained / "adapter_model.safetensors")
    assert set(weights) == {
        f"base_model.model.{path}.lora_{side}.weight" for path in config["target_modules"] for side in "AB"
    }
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 6
    assert json.loads((trained / "run.json").read_text())["recipe"]["training"]["max_steps"] == 6


def test_plain_peft_loads_it_and_off_is_the_base_bit_for_bit(trained, model_folder):
    whole = load_model(model_folder)
    inputs = whole.encode(["what is it"], [picture()], completions=["a square"])
    kwargs = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "pixel_values": inputs.pixel_values,
        "image_sizes": inputs.beside["image_sizes"],
    }
    base = LlavaNextForConditionalGeneration.from_pretrained(model_folder)
    expected = base(**kwargs).logits
    adapted = PeftModel.from_pretrained(base, trained)
    assert not torch.equal(adapted(**kwargs).logits, expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(**kwargs).logits, expected)
    ours = load_model(model_folder, adapter=trained)
    torch.testing.assert_close(ours.forward(inputs).logits, adapted(**kwargs).logits)
    merged = adapted.merge_and_unload()(**kwargs).logits
    torch.testing.assert_close(merged, ours.forward(inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_card_says_what_was_done_and_its_recipe_does_it_again(trained, recipe, examples, tmp_path):
    card = (trained / "README.md").read_text()
    for part in ("library_name: peft", "| circuit_breaker | text | made | 6 |", "2406.04313", "| 5 | multimodal |"):
        assert part in card
    assert "No rows were held out" in card and "| why |" not in card
    (tmp_path / "recipe.yaml").write_text(card.partition("```yaml\n")[2].partition("\n```")[0])
    assert "mm-cb train recipe.yaml" in card
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()


def test_the_card_shows_how_held_out_rows_fare(recipe, examples, tmp_path):
    out = train(
        recipe("training.held_out=2", "training.max_steps=2", "training.learning_rate=0.01"), tmp_path, examples
    )
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    card = (out / "README.md").read_text()
    for record in metrics:
        for name in ("circuit_breaker", "retain"):
            cosine, off, on = (record[f"held_out_{name}_{k}"] for k in ("cosine", "norm_reference", "norm_adapted"))
            assert f"| {name} | {record['step']} | {cosine:.3f} | {off:.4g} | {on:.4g} |" in card


def test_nothing_in_a_recipe_ends_its_block_in_the_card():
    card = model_card({"name": "a```\n# b", "model": "x/````y"}, [], ["p"], [])
    assert "`````yaml\n" in card and card.rstrip().endswith("\n`````")


def test_the_card_has_a_dash_for_what_rows_of_an_earlier_version_lack():
    """A training begun before metrics had `length_loss` is resumed: its first rows lack it, its last have it."""
    old = {"step": 1, "modality": "text", "reroute_loss": 0.5, "retain_loss": 0.25}
    old |= {"reroute_coeff": 5.0, "retain_coeff": 0.0, "grad_norm": 1.5, "learning_rate": 1e-4}
    new = old | {"step": 2, "length_loss": 0.125}
    card = model_card({"name": "n", "model": "m"}, [], ["p"], [old, new])
    assert "| 1 | text | 0.5 | - | 0.25 | 5 | 0 | 1.5 | 0.0001 |" in card
    assert "| 2 | text | 0.5 | 0.125 | 0.25 | 5 | 0 | 1.5 | 0.0001 |" in card


def damaged_rows(folder):
    """`data=` of a file of rows with pictures, one of which is damaged; SKIP stands for whether it is left out."""
    asked = {"circuit_breaker": "what is it", "retain": "tell me"}

    def row(number, set_name, image):
        content = [{"type": "text", "text": asked[set_name]}, *([{"type": "image"}] if image else [])]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red square"}]
        name = f"{set_name}-{number}-{int(image)}"
        if image:
            picture(number).save(folder / f"{name}.png")
        return {"id": name, "messages": turns, "images": [f"{name}.png"] * image, "set": set_name, "source": "own"}

    rows = [row(n, s, i) for n in range(3) for s in ("circuit_breaker", "retain") for i in (False, True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "retain-1-1.png").write_bytes(b"damaged")
    return f"data={{sources: [{{name: {folder / 'rows.jsonl'}}}], skip_missing_images: SKIP}}"


def test_damaged_pictures_name_their_row_or_are_left_out_and_counted(trained, recipe, tmp_path, model_folder):
    data = damaged_rows(tmp_path)
    damaged = r"rows\.jsonl:8: cannot read the picture `.*retain-1-1\.png`.*[^.]\. `mm-cb data check`.*skip_missing"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=damaged):
        patch.setattr("mm_cb.training.run.RRTrainer", None)  # before anything is loaded
        train(recipe(data.replace("SKIP", "false")), tmp_path / "stops")
    skipping = recipe(data.replace("SKIP", "true"))
    with pytest.warns(UserWarning, match=r"left out: .*rows\.jsonl:8"), pytest.raises(Stop):
        train(skipping, tmp_path / "run", progress=StoppingProgress(at=3))
    train(skipping, tmp_path / "run")
    (note,) = [json.loads(line) for line in (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()]
    assert note["id"] == "retain-1-1"
    assert read_run(tmp_path / "run")["left_out"] == {"own: picture cannot be read": 1}
    assert "| own: picture cannot be read | 1 |" in (tmp_path / "run" / "README.md").read_text()
    with pytest.warns(UserWarning, match="left out"):
        train(skipping, tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_a_run_that_diverges_says_what_to_change(recipe, examples, tmp_path):
    with pytest.raises(UserError, match=r"training diverged; lower `training\.learning_rate`"):
        train(recipe("training.learning_rate=10", "training.max_grad_norm=1000000"), tmp_path / "run", examples)


def test_the_same_run_gives_the_same_bytes_and_another_seed_does_not(trained, recipe, examples, tmp_path):
    again = train(recipe(), tmp_path / "again", examples)
    assert adapter_bytes(again) == adapter_bytes(trained)
    assert (again / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert (again / "README.md").read_bytes() == (trained / "README.md").read_bytes()
    assert (again / "adapter_config.json").read_bytes() == (trained / "adapter_config.json").read_bytes()
    other = train(recipe("seed=1"), tmp_path / "other", examples)
    assert adapter_bytes(other) != adapter_bytes(trained)


def test_recomputed_blocks_store_less_and_change_no_bit(trained, recipe, examples, tmp_path, monkeypatch):
    real, stored = ReroutingTrainer.training_step, {}

    def step(trainer, *arguments):
        sizes = stored.setdefault(trainer.args.output_dir, {})

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return real(trainer, *arguments)

    monkeypatch.setattr(ReroutingTrainer, "training_step", step)
    two = "lora.layers_to_transform=[0,1]"
    folders = [train(recipe(two, f"training.recompute={on}"), tmp_path / on, examples) for on in ("false", "true")]
    assert adapter_bytes(folders[0]) == adapter_bytes(folders[1]) != adapter_bytes(trained)
    kept, recomputed = (sum(sizes.values()) for sizes in stored.values())
    assert recomputed < kept / 2


@pytest.mark.parametrize("stop", [1, 6])
def test_an_interrupted_run_goes_on_to_the_same_adapter(trained, recipe, examples, tmp_path, stop):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(recipe(), out, examples, StoppingProgress(at=stop))
    assert not (out / "adapter_model.safetensors").exists()
    progress = StoppingProgress()
    train(recipe(), out, examples, progress)
    assert len(progress.shown) == 6 - (stop - 1) // 2 * 2, "finished steps must not be repeated"
    assert adapter_bytes(out) == adapter_bytes(trained)
    assert (out / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_an_interrupted_run_with_accumulation_and_a_falling_rate_goes_on_to_the_same_adapter(
    recipe, examples, tmp_path
):
    falling = ("training.lr_scheduler_type=linear", "training.learning_rate=0.001")
    accumulated = recipe("training.gradient_accumulation_steps=4", "training.max_steps=4", *falling)
    whole = train(accumulated, tmp_path / "whole", examples)
    with pytest.raises(Stop):
        train(accumulated, tmp_path / "run", examples, StoppingProgress(at=3))
    train(accumulated, tmp_path / "run", examples)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert metrics[0] == metrics[1]
    rates = [line["learning_rate"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.001, 0.00075, 0.0005, 0.00025])


SCHEDULE = "circuit_breaker.schedule_steps=6"


@pytest.fixture(scope="module")
def after(tmp_path_factory, model_folder, examples):
    """Adapters of 4, 5 and 6 steps on a schedule of 6, which are one run, looked at after these."""
    out, weights = tmp_path_factory.mktemp("after"), []
    for steps in (4, 5, 6):
        recipe = load_recipe("miniature", [f"model={model_folder}", *OPTIONS, f"training.max_steps={steps}", SCHEDULE])
        weights.append(load_file(train(recipe, out / str(steps), examples) / "adapter_model.safetensors"))
    return weights


@pytest.mark.parametrize("stop", [None, 2, 5, 6])
def test_an_averaged_adapter_is_the_mean_of_the_last_steps_also_of_a_run_that_was_interrupted(
    recipe, examples, tmp_path, stop, after
):
    averaged = recipe("training.average_last=0.5", SCHEDULE)
    if stop:
        with pytest.raises(Stop):
            train(averaged, tmp_path / "run", examples, StoppingProgress(at=stop))
    found = load_file(train(averaged, tmp_path / "run", examples) / "adapter_model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight, torch.stack([w[name] for w in after]).mean(0), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(weight, after[-1][name]) for name, weight in found.items())


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, model_folder, examples):
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stop):
        train(load_recipe("miniature", [f"model={model_folder}", *OPTIONS]), out, examples, StoppingProgress(at=5))
    return out


def test_a_torn_checkpoint_is_not_used_and_told(trained, stopped, recipe, examples, tmp_path, caplog):
    out = shutil.copytree(stopped, tmp_path / "run")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-4"]
    torn = out / "checkpoints" / "checkpoint-6"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    progress = StoppingProgress()
    train(recipe(), out, examples, progress)
    assert f"The checkpoint `{torn}` was not written to its end" in caplog.text
    assert len(progress.shown) == 2
    assert adapter_bytes(out) == adapter_bytes(trained)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_checkpoint_whose_files_are_not_as_they_were_is_refused_by_name(name, damage, stopped, tmp_path):
    folder = shutil.copytree(stopped / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    refuse_changed(folder)
    held = (folder / name).read_bytes()
    (folder / name).write_bytes(held[: len(held) // 2] if damage == "cut" else held.replace(b"4", b"2"))
    if damage == "gone":
        (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}` is gone, damaged or was changed .* delete the folder"):
        refuse_changed(folder)


def test_a_changed_checkpoint_is_not_gone_on_from_and_one_of_an_earlier_version_is(stopped, recipe, examples, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    folder = out / "checkpoints" / "checkpoint-4"
    state = folder / "trainer_state.json"
    held = state.read_text()
    state.write_text(held.replace('"global_step": 4', '"global_step": 5'))
    with pytest.raises(UserError, match=r"trainer_state\.json` is gone, damaged or was changed"):
        train(recipe(), out, examples)
    state.write_text(held)
    (folder / "complete").write_text((folder / "complete").read_text().partition("\n")[0])
    refuse_changed(folder)


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path):
    for steps in (9, 10, 8):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        (folder / "complete").touch()
    assert last_checkpoint(tmp_path, "", remove_torn=True).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "complete").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="must be UTF-8"):
        last_checkpoint(tmp_path, "0" * 64, remove_torn=True)


def test_from_the_first_on_a_whole_checkpoint_is_there_at_every_moment(recipe, examples, tmp_path, monkeypatch):
    """A kill can come before any change of the disk; what it would leave is looked at there."""
    out, left = tmp_path / "run", []

    def watched(change):
        def look_first(*args, **kwargs):
            newest = last_checkpoint(out / "checkpoints", "", remove_torn=False)
            if not (out / "adapter_model.safetensors").exists():
                left.append((newest.name, *sorted(os.listdir(newest))) if newest else None)
            return change(*args, **kwargs)

        return look_first

    for module, name in ((torch, "save"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    train(recipe(), out, examples)
    first, *later = dict.fromkeys(left)
    assert first is None and [name for name, *_ in later] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert None not in left[left.index(later[0]) :] and len({tuple(files) for _, *files in later}) == 1


class KilledProgress(StoppingProgress):
    """One that keeps what a process killed at a step would leave on the disk: nothing is flushed or tidied up first."""

    def __init__(self, at, out, left):
        super().__init__(at)
        self.out, self.left = out, left

    def advance(self, n=1, note=""):
        if self.done + n == self.at:
            shutil.copytree(self.out, self.left)
        super().advance(n, note)


def test_a_killed_process_goes_on_to_the_same_adapter(trained, examples, tmp_path, recipe):
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    step = random.Random(seed).randint(1, 6)
    sys.stdout.write(f"killed after step {step}; again with KILL_SEED={seed}\n")  # pytest shows it on failure
    left = tmp_path / "left"
    with pytest.raises(Stop):
        train(recipe(), tmp_path / "run", examples, KilledProgress(step, tmp_path / "run", left))
    progress = StoppingProgress()
    train(recipe(), left, examples, progress)
    assert len(progress.shown) == 6 - (step - 1) // 2 * 2
    assert adapter_bytes(left) == adapter_bytes(trained)


def test_a_finished_run_is_not_repeated(trained, recipe, examples, tmp_path):
    progress = StoppingProgress()
    before = adapter_bytes(trained)
    assert train(recipe(), trained, examples, progress) == trained
    assert progress.shown == [] and adapter_bytes(trained) == before


def other_weights(folder):
    """Let a model that stands at the same place have other weights, as after a new download."""
    model = tiny_llava(blocks=4, seed=1)
    model.model.save_pretrained(folder)
    return folder


def test_a_run_does_not_go_on_with_another_base(model_folder, examples, tmp_path):
    mine = shutil.copytree(model_folder, tmp_path / "model")
    recipe = load_recipe("miniature", [f"model={mine}", *OPTIONS])
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", examples, StoppingProgress(at=3))
    other_weights(mine)
    with pytest.raises(UserError, match=r"checkpoint-2` was trained on other weights"):
        train(recipe, tmp_path / "run", examples)
    shutil.copytree(model_folder, mine, dirs_exist_ok=True)
    train(recipe, tmp_path / "run", examples)
    other_weights(mine)
    with pytest.raises(UserError, match=r"run` was trained on other weights than those of"):
        train(recipe, tmp_path / "run", examples)


def test_a_run_that_made_nothing_leaves_its_folder_to_the_corrected_one(recipe, examples, tmp_path):
    with pytest.raises(UserError, match="nobody/nothing"):
        train(recipe("model=nobody/nothing"), tmp_path / "run", examples)
    with pytest.raises(UserError, match="circuit_breaker set"):
        train(recipe("training.max_steps=2"), tmp_path / "run", [e for e in examples if e.modality == "text"])
    train(recipe("training.max_steps=1"), tmp_path / "run", examples)


def test_another_runs_folder_is_refused(trained, recipe, examples):
    with pytest.raises(UserError, match="training.learning_rate"):
        train(recipe("training.learning_rate=0.5"), trained, examples)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("circuit_breaker.target_layers=[9]", r"1\.\.4.*\[9\]"),
        ("circuit_breaker.target_layers=[1]", "cannot change"),
        ("lora.layers_to_transform=[7]", r"0\.\.3"),
        ("lora.modules=[fc1]", "must be among"),
        ("attention=flash_attention_2", "needs a GPU, .* the device is `cpu`"),
        ("model=/nowhere/at/all", "must be a folder, which is not here, or a name on the hub"),
    ],
)
def test_a_recipe_that_does_not_fit_is_the_users_error(recipe, examples, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(recipe(override), tmp_path / "run", examples)


def test_missing_rows_are_the_users_error(recipe, examples, tmp_path):
    with pytest.raises(UserError, match="multimodal examples of the circuit_breaker set"):
        train(recipe(), tmp_path / "run", [e for e in examples if e.modality == "text"])


@pytest.mark.parametrize(
    "says",
    ["PytorchStreamWriter failed: [enforce fail at inline_container.cc:664]", "basic_ios::clear: iostream error"],
)
def test_a_full_disk_is_the_users_error_and_the_run_can_go_on(trained, recipe, examples, tmp_path, monkeypatch, says):
    real, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 6:
            raise RuntimeError(says)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        train(recipe(), tmp_path / "run", examples)
    monkeypatch.undo()
    train(recipe(), tmp_path / "run", examples)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(trained)


def test_data_from_files(recipe, tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}], "images": []}
    for name, id in [("one", "a"), ("two", "b"), ("three", "a")]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**record, "id": id, "set": "retain", "source": name}))
    files = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two", "three")}
    loaded = load_examples(recipe(f"data=[{files['one']}, {files['two']}]"))
    assert [example.id for example in loaded] == ["a", "b"]
    with pytest.raises(UserError, match=r"three\.jsonl:1: the id `a` was used at .*one\.jsonl:1"):
        load_examples(recipe(f"data=[{files['one']}, {files['three']}]"))
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    shown = {**record, "messages": [{"role": "user", "content": content}, record["messages"][1]], "images": ["x.png"]}
    (tmp_path / "picture.jsonl").write_text(json.dumps({**shown, "id": "a", "set": "retain"}))
    with pytest.raises(
        UserError, match=r"picture\.jsonl:1: the picture `.*x\.png` is not there; .*skip_missing_images"
    ):
        load_examples(recipe(f"data=[{tmp_path / 'picture.jsonl'}]"))
    assert "`nowhere.jsonl` is not there" in absent_data(recipe("data=[nowhere.jsonl]"))["nowhere.jsonl"]


def _nothing(tensors):
    return {name.replace("layers.", "block."): tensor for name, tensor in tensors.items()}


def _half(tensors):
    return dict(sorted(tensors.items())[: len(tensors) // 2])


def _nan(tensors):
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [(_nothing, "tensors of .* are missing"), (_half, "tensors of .* are missing"), (_nan, "have NaN or infinity")],
)
def test_a_checkpoint_whose_adapter_is_not_whole_is_not_gone_on_from(
    change, expected, stopped, recipe, examples, tmp_path
):
    out = shutil.copytree(stopped, tmp_path / "run")
    file = out / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"checkpoint-4.*{expected}"):
        train(recipe(), out, examples)
    assert not (out / "adapter_model.safetensors").exists() and (out / "metrics.jsonl").read_bytes() == before


def test_a_run_that_keeps_what_is_said_goes_on_to_the_same_adapter_and_moves_a_block_no_state_loss_sees(
    recipe, examples, tmp_path
):
    """The KL of logits reaches block 3, above the only target; without it that block has no gradient."""
    kl = recipe("circuit_breaker.retain=kl", "circuit_breaker.retain_scale=relative", "lora.layers_to_transform=[1,3]")
    whole = train(kl, tmp_path / "whole", examples)
    with pytest.raises(Stop):
        train(kl, tmp_path / "run", examples, StoppingProgress(at=3))
    assert adapter_bytes(train(kl, tmp_path / "run", examples)) == adapter_bytes(whole)
    moved = {name: w for name, w in load_file(whole / "adapter_model.safetensors").items() if "lora_B" in name}
    assert all(weight.abs().max() > 0 for weight in moved.values()) and any(".layers.3." in name for name in moved)


@pytest.mark.parametrize("unread", ["retain_scale=absolute", "retain_layers=targets"])
def test_what_the_kl_does_not_read_is_refused(recipe, unread):
    given = ["circuit_breaker.retain=kl", "circuit_breaker.retain_scale=relative", f"circuit_breaker.{unread}"]
    with pytest.raises(UserError, match=f"does not read `{unread.partition('=')[0]}`: set it to"):
        recipe(*given)
