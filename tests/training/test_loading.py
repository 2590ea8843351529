import gc
import multiprocessing
import os
import signal

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from mm_cb import RRConfig, RRTrainer
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory, read_run
from mm_cb.training import loading
from mm_cb.training.batches import PairCollator, PairedExamples
from mm_cb.training.loading import batches_ahead, number_of_workers
from mm_cb.training.planning.plan import make_plan
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import measure_start, train
from tests.tiny_llava import picture, tiny_llava
from tests.training.test_run import OPTIONS, Stop, StoppingProgress, adapter_bytes, damaged_rows

MASKS = {"text": "user_and_assistant", "multimodal": "after_image"}


@pytest.fixture
def recipe(model_folder):
    def make(workers, *overrides):
        given = [f"model={model_folder}", *OPTIONS, f"training.dataloader_num_workers={workers}", *overrides]
        return load_recipe("miniature", given)

    return make


@pytest.fixture
def nobody_left():
    yield
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.fixture
def rows(tmp_path):
    """Rows one of whose pictures is damaged, without the check before the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm_cb.training.run.open_drawn", lambda *given: None)
        yield damaged_rows(tmp_path)


def test_any_number_of_workers_gives_the_same_files_also_after_an_interruption(recipe, examples, tmp_path, nobody_left):
    folders = {workers: train(recipe(workers), tmp_path / f"{workers}", examples) for workers in (0, 3)}
    with pytest.raises(Stop):
        train(recipe(3), tmp_path / "stopped", examples, StoppingProgress(at=3))
    folders["stopped"] = train(recipe(1), tmp_path / "stopped", examples)
    for folder in folders.values():
        for name in ("adapter_model.safetensors", "metrics.jsonl", "README.md"):
            assert (folder / name).read_bytes() == (folders[0] / name).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_pictures_change_no_file_and_are_not_prepared_again(recipe, examples, tmp_path, monkeypatch, workers):
    without = train(recipe(workers), tmp_path / "without", examples)
    kept = f"training.picture_cache={tmp_path / 'kept'}"
    folders = [train(recipe(workers, kept), tmp_path / "first", examples)]

    def refuse(*given):
        raise AssertionError("a picture was prepared")

    monkeypatch.setattr("mm_cb.models.vision.VisionModel._shown", refuse)
    folders.append(train(recipe(workers, kept), tmp_path / "second", examples))
    for folder in folders:
        for name in ("adapter_model.safetensors", "metrics.jsonl", "README.md"):
            assert (folder / name).read_bytes() == (without / name).read_bytes()


def test_a_stopped_run_goes_on_with_pictures_kept_or_not(recipe, examples, tmp_path):
    with pytest.raises(Stop):
        train(recipe(0), tmp_path / "stopped", examples, StoppingProgress(at=3))
    stopped = train(recipe(0, f"training.picture_cache={tmp_path / 'kept'}"), tmp_path / "stopped", examples)
    assert adapter_bytes(stopped) == adapter_bytes(train(recipe(0), tmp_path / "whole", examples))


def test_a_cache_of_pictures_without_rows_with_pictures_is_refused(recipe, examples, tmp_path):
    given = [f"training.picture_cache={tmp_path / 'kept'}", "batches=text"]
    for ask in (make_plan, lambda asked: train(asked, tmp_path / "run", examples)):
        with pytest.raises(UserError, match=r"picture_cache` is for rows with pictures.*leave it out"):
            ask(recipe(0, *given))
    assert not (tmp_path / "kept").exists()


def test_a_dry_run_and_a_lent_model_keep_nothing(recipe, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_cb.training.run.load_examples", lambda recipe: examples)
    measure_start(make_plan(recipe(0, f"training.picture_cache={tmp_path / 'kept'}")))
    assert not (tmp_path / "kept").exists()
    small = {"max_steps": 2, "batch_size": 2, "held_out": 0, "target_layers": [2], "picture_cache": tmp_path / "kept"}
    config = RRConfig(output_dir=tmp_path / "run", device="cpu", **small)
    trainer = RRTrainer(tiny_llava(blocks=4), config, examples, peft_config=LoraConfig(layers_to_transform=[1]))
    trainer.train()
    kept = len(list((tmp_path / "kept").iterdir()))
    trainer._encoder.encode(["a"], [picture(99)])
    assert len(list((tmp_path / "kept").iterdir())) == kept > 0


def test_a_cache_for_a_family_of_the_users_or_behind_a_link_into_nowhere_is_refused(
    recipe, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr("mm_cb.training.rr_trainer.load_tower", None)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "kept")
    with pytest.raises(UserError, match="is a link to"):
        train(recipe(0, f"training.picture_cache={tmp_path / 'link'}"), tmp_path / "run", examples)
    monkeypatch.setattr("mm_cb.models.llava_next.LlavaNextModel.__module__", "mine")
    with pytest.raises(UserError, match="not for `LlavaNextModel`, whose code may change"):
        make_plan(recipe(0, f"training.picture_cache={tmp_path / 'kept'}"))


@pytest.mark.parametrize(("given", "got"), [("5", "5"), ('""', "''"), ('" "', "' '"), ("~/kept", "'~/kept'")])
def test_a_cache_that_is_no_path_is_refused_in_plain_words(recipe, given, got):
    with pytest.raises(UserError, match=rf"`training.picture_cache`: a path is expected(, without `~`)?, got {got}\."):
        recipe(0, f"training.picture_cache={given}")


def test_a_cache_that_is_no_folder_is_refused_before_the_model_is_read(recipe, examples, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("mm_cb.training.rr_trainer.load_tower", None)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for ask in (make_plan, lambda asked: train(asked, tmp_path / "run", examples)):
            with pytest.raises(UserError, match=r"`training.picture_cache` must be a folder, `.*/file` is a file"):
                ask(recipe(0, f"training.picture_cache={folder}"))


def test_batches_are_made_in_workers_and_are_the_same(examples, monkeypatch):
    dataset = PairedExamples(examples, steps=4, batch_size=4, batches="alternate", seed=0)
    collator = PairCollator(tiny_llava(), MASKS)
    here, ahead = (list(batches_ahead(dataset, collator, 2, workers=workers)) for workers in (0, 2))
    assert len(here) == len(ahead) == 8
    for one, other in zip(here, ahead, strict=True):
        for name in ("circuit_breaker", "retain"):
            ours, theirs = one.batch[name], other.batch[name]
            assert ours["ids"] == theirs["ids"] and ours["lengths"] == theirs["lengths"]
            assert torch.equal(ours["mask"], theirs["mask"])
            assert torch.equal(ours["inputs"].input_ids, theirs["inputs"].input_ids)
            if one.batch["modality"] == "multimodal":
                assert torch.equal(ours["inputs"].pixel_values, theirs["inputs"].pixel_values)
                assert theirs["inputs"].pixel_values.is_shared() and not ours["inputs"].pixel_values.is_shared()
    monkeypatch.setattr(collator, "_rows", lambda *given: os.getpid())
    monkeypatch.setattr(loading, "_shared", lambda batch: batch)
    (pid,) = {one.batch["retain"] for one in batches_ahead(dataset, collator, 2, workers=1)}
    assert pid != os.getpid()


def test_a_picture_that_fails_is_told_in_the_same_line(recipe, rows, tmp_path, nobody_left):
    said = []
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"rows\.jsonl:8: cannot read the picture .*skip_missing_images") as told:
            train(recipe(workers, rows.replace("SKIP", "false")), tmp_path / f"{workers}")
        said.append(str(told.value))
        del told
    assert said[0] == said[1] and "Traceback" not in said[1]


def test_rows_left_out_by_a_worker_are_told_and_counted_once(recipe, rows, tmp_path):
    skipping = rows.replace("SKIP", "true")
    for workers in (0, 2):
        with pytest.warns(UserWarning, match=r"left out: .*rows\.jsonl:8"):
            train(recipe(workers, skipping), tmp_path / f"{workers}")
        assert len((tmp_path / f"{workers}" / "unreadable.jsonl").read_text().splitlines()) == 1
        assert read_run(tmp_path / f"{workers}")["left_out"] == {"own: picture cannot be read": 1}
    assert adapter_bytes(tmp_path / "0") == adapter_bytes(tmp_path / "2")


def test_a_worker_that_dies_and_a_lack_of_shared_memory_are_one_line_and_the_run_goes_on(
    recipe, examples, tmp_path, monkeypatch
):
    plain = train(recipe(0), tmp_path / "plain", examples)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_shared", lambda batch: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"was ended, perhaps for want of memory .*dataloader_num_workers"):
            train(recipe(1), tmp_path / "run", examples)

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "share_memory_", full)
        with pytest.raises(UserError, match=r"shared memory \(`/dev/shm`\).* MiB are free.*dataloader_num_workers"):
            train(recipe(1), tmp_path / "run", examples)
    assert adapter_bytes(train(recipe(0), tmp_path / "run", examples)) == adapter_bytes(plain)


def test_a_run_stopped_early_leaves_no_worker(recipe, examples, tmp_path, nobody_left):
    overrides = ("training.held_out=1", "training.held_out_steps=1", "training.stop_at_cosine=0.9997")
    overrides += ("training.learning_rate=0.005",)
    out = train(recipe(2, *overrides), tmp_path / "run", examples)
    assert len((out / "metrics.jsonl").read_text().splitlines()) < 6


def test_a_forked_process_does_not_hold_the_runs_lock(tmp_path):
    """A worker lives on for seconds when the run is killed; the run can be taken up again at once."""
    run = RunDirectory(tmp_path / "run", "train", {}, 0).open()
    reading, writing = os.pipe()
    forked, begun = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.write(begun, b"1")
        os.read(reading, 1)  # until the parent is done
        os._exit(0)
    os.read(forked, 1)
    with pytest.raises(UserError, match="another mm-cb process"):
        RunDirectory(tmp_path / "run", "train", {}, 0).open()
    run.close()
    RunDirectory(tmp_path / "run", "train", {}, 0).open().close()
    os.close(writing)
    os.waitpid(child, 0)


def test_how_many_workers_there_are(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    assert number_of_workers(None, "cpu") == 0 and number_of_workers(7, "cpu") == 7
    assert number_of_workers(None, "cuda") == 2 and number_of_workers(0, "cuda") == 0
    monkeypatch.setattr(loading, "ROOM", 2**60)
    assert number_of_workers(None, "cuda") == 0
    monkeypatch.delattr(os, "fork")
    with pytest.raises(UserError, match="must be forked"):
        number_of_workers(1, "cpu")
