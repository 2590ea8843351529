import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from image_attacks import save_png
from mm_cb.core import files
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256, write_text
from mm_cb.core.hub import fetch
from mm_cb.core.runs import (
    RunDirectory,
    append_jsonl,
    finished_run,
    held,
    read_jsonl,
    read_run,
    unwritten,
    write_bytes,
    write_json,
    write_jsonl,
)
from mm_cb.core.seal import sealed

RECIPE = {"attack": {"steps": 100, "epsilon": 32}, "items": ["a", "b"]}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


# files


def test_many_writers_of_one_file_leave_one_of_their_contents_and_nothing_else(tmp_path):
    contents = [bytes([number]) * 50_000 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:  # one process, so one pid, as two containers have
        list(pool.map(lambda content: write_bytes(tmp_path / "file", content), contents * 4))
    assert (tmp_path / "file").read_bytes() in contents and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_old_or_new_and_nothing_else_remains(tmp_path, monkeypatch):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"value": 1, "path": Path("p")})
    full_disk(monkeypatch)
    with pytest.raises(UserError, match=r"x\.json` could not be written: the disk is full"):
        write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1, "path": "p"}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_file_that_may_be_no_larger_is_no_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for write in (
            lambda: write_json(tmp_path / "a", "x" * 200),
            lambda: append_jsonl(tmp_path / "b", {"x": "x" * 200}),
        ):
            with pytest.raises(UserError, match="could not be written: a file may be no larger here .*ulimit -f") as e:
                write()
            assert "disk" not in str(e.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_really_full_device_is_a_user_error():
    with pytest.raises(UserError, match="disk is full"):
        append_jsonl(Path("/dev/full"), {"id": "a"})


def test_a_file_in_place_of_a_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (lambda path: write_bytes(path, b""), lambda path: append_jsonl(path, {})):
        with pytest.raises(UserError, match="must be writable"):
            call(tmp_path / "file" / "x")


def test_strict_json_only(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    with pytest.raises(TypeError, match="set"):
        write_json(tmp_path / "x.json", {"loss": {1}})
    assert list(tmp_path.iterdir()) == []


def test_lines_round_trip_whatever_text_they_hold(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [{"text": "a\nb\u2028c\x85"}, {"text": "\udc80é"}, {"n": 0.1}]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    write_jsonl(path, records[:1])
    assert read_jsonl(path) == records[:1]
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 100_000])
def test_a_torn_line_is_dropped_and_then_cut_off(tmp_path, cut):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"id": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"id": "b" * 200_000}).encode()[:cut])
    assert read_jsonl(path) == [{"id": "a"}]
    append_jsonl(path, {"id": "c"})
    assert read_jsonl(path) == [{"id": "a"}, {"id": "c"}]
    path.write_bytes(b'{"id"')
    append_jsonl(path, {"id": "d"})
    assert read_jsonl(path) == [{"id": "d"}]


@pytest.mark.parametrize("damage", [b"\x89PNG\r", b"\xff\xfe{", b"{\0\0\0", b'{"id": "\xff', b"gone"])
@pytest.mark.parametrize("before", [b"", b'{"id": "a"}\n'])
def test_an_end_that_is_no_torn_line_is_named(tmp_path, damage, before):
    (tmp_path / "x.jsonl").write_bytes(before + damage)
    with pytest.raises(UserError, match=rf"x\.jsonl:{1 + bool(before)} must be one JSON object, .* damaged"):
        read_jsonl(tmp_path / "x.jsonl")


def test_a_line_torn_inside_a_character_is_dropped(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('{"id": "é'.encode()[:-1])
    assert read_jsonl(tmp_path / "x.jsonl") == []


def test_a_failed_append_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"id": "a"})
    before = path.read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(UserError, match="disk is full"):
        append_jsonl(path, {"id": "b"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{broken", "[1]", "nan?", '{"a": "\0"}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"id": "a"}}\n{line}\n{{"id": "b"}}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2 must be one JSON object") as error:
        read_jsonl(path)
    assert ".." not in str(error.value)


def test_other_file_errors_stay_as_they_are(tmp_path):
    with pytest.raises(OSError) as caught, files.file_errors(tmp_path):
        raise OSError(errno.EIO, "broken disk")
    assert not isinstance(caught.value, UserError)


# run directories


def test_a_new_run_says_what_it_is(out, tmp_path):
    data = tmp_path / "behaviors.jsonl"
    data.write_text("{}\n")
    with RunDirectory(out, "attack", RECIPE, 3, inputs=[data]) as run:
        assert not run.finished
        content = read_run(out)
    assert content["command"] == "attack" and content["recipe"] == RECIPE and content["seed"] == 3
    assert content["inputs"] == {"behaviors.jsonl": files.file_sha256(data)}
    assert {"python", "torch", "torchvision", "transformers", "peft", "accelerate", "pillow", "numpy"} <= set(
        content["versions"]
    )
    assert content["hardware"]["cores"] >= 1 and content["started"] and content["ended"] is None and "git" in content


def test_the_same_run_is_resumed_and_a_finished_one_left_alone(out):
    with RunDirectory(out, "demo", RECIPE, 0) as run:
        append_jsonl(run.path / "items.jsonl", {"id": "a"})
        assert run.stage("images").is_dir()
    with RunDirectory(out, "demo", RECIPE, 0) as run:
        assert not run.finished and read_jsonl(run.path / "items.jsonl") == [{"id": "a"}]
        run.finish()
    finished = (out / "run.json").read_bytes()
    assert len(read_run(out)["resumed"]) == 1
    with RunDirectory(out, "demo", RECIPE, 0) as run:
        assert run.finished
    assert (out / "run.json").read_bytes() == finished


def test_another_runs_results_are_refused_and_the_differing_keys_named(out, tmp_path):
    data = tmp_path / "b.jsonl"
    data.write_text("1")
    RunDirectory(out, "attack", RECIPE, 0, inputs=[data]).open().close()
    data.write_text("2")
    other = {"attack": {"steps": 300, "epsilon": 32}, "items": ["a", "b"], "new": True}
    with pytest.raises(UserError) as caught:
        RunDirectory(out, "attack", other, 1, inputs=[data]).open()
    message = str(caught.value)
    assert "holds another run's results" in message
    assert "recipe.attack.steps (100 there, 300 here)" in message
    assert "recipe.new (absent there, true here)" in message
    assert "seed (0 there, 1 here)" in message and "inputs.b.jsonl" in message
    assert "epsilon" not in message and "command" not in message
    data.write_text("1")
    RunDirectory(out, "attack", RECIPE, 0, inputs=[data]).open().close()  # the refusal changed nothing


def test_foreign_folders_files_and_damaged_runs_are_refused(out):
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"other files \(`thesis.tex`, 1 in all\)"):
        RunDirectory(out, "demo", {}, 0).open()
    assert [entry.name for entry in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="must be a directory, got the file"):
        RunDirectory(out / "thesis.tex", "demo", {}, 0).open()
    with pytest.raises(UserError, match="must be writable"):
        RunDirectory(out / "thesis.tex" / "deeper", "demo", {}, 0).open()
    (out / "run.json").write_text('{"command": ')
    with pytest.raises(UserError, match=r"run\.json:1` cannot be read"):
        RunDirectory(out, "demo", {}, 0).open()


@pytest.mark.parametrize("schema", [4, 101, 0])
def test_a_run_of_another_schema_is_refused_by_name(out, schema):
    with RunDirectory(out, "attack", {"epsilon": 8}, 0) as run:
        run.finish()
    write_json(out / "run.json", {**read_run(out), "schema": schema})
    with pytest.raises(UserError, match=f"run.json` must have schema 3, got {schema}: open it with the version"):
        read_run(out)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"runs": [0.5]}, r"`runs\[0\]` must be an object, got 0\.5"),
        ({"options": [1]}, "`options` must be an object or null"),
        ({"options": {"steps": "many"}}, r"`options\.steps` must be a whole number"),
        ({"steps": "9"}, "`steps` must be a whole number or null"),
    ],
)
def test_a_recipe_whose_parts_nobody_wrote_is_named(recipe, named, out):
    with RunDirectory(out, "attack", RECIPE, 0):
        pass
    write_json(out / "run.json", {**read_run(out), "recipe": recipe})
    with pytest.raises(UserError, match=rf"run\.json`: `recipe`: {named}"):
        read_run(out)


def test_what_is_no_run_directory_is_told_as_what_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, came in (("none", "there is none"), ("file", "it is a file"), ("folder", r"it holds no run\.json")):
        with pytest.raises(UserError, match=f"{name}` must be a run directory, but {came}; give"):
            read_run(tmp_path / name)


def test_a_missing_input_is_named_and_leaves_nothing_that_blocks_the_next_try(out, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl` must be a readable file"):
        RunDirectory(out, "attack", {}, 0, inputs=[tmp_path / "none.jsonl"]).open()
    RunDirectory(out, "attack", {}, 0).open().close()


def test_inputs_are_hashed_once_and_before_the_lock_is_taken(out, tmp_path, monkeypatch):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    locked = []

    def slow_hash(file):
        locked.append(is_locked(out))
        return files.file_sha256(file)

    monkeypatch.setattr("mm_cb.core.runs.file_sha256", slow_hash)
    run = RunDirectory(out, "attack", RECIPE, 0, inputs=[weights])
    with run:
        assert is_locked(out)
    with run:
        assert read_run(out)["inputs"] == {"model.safetensors": files.file_sha256(weights)}
    assert locked == [False]


def is_locked(folder):
    """Whether somebody holds the folder's lock; another descriptor of this process is somebody else, too."""
    if not folder.exists():
        return False
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_two_processes_cannot_write_into_one_run(out):
    code = f"""
from pathlib import Path
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory
try:
    RunDirectory(Path({str(out)!r}), "demo", {{}}, 0).open()
except UserError as e:
    print(e)
else:
    print("opened")
"""

    def elsewhere():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        return done.stdout.strip()

    with RunDirectory(out, "demo", {}, 0):
        assert "is in use by another mm-cb process" in elsewhere()
    assert elsewhere() == "opened"


def elsewhere(out, code):
    """What another process prints that does something with a run."""
    head = "from pathlib import Path\nfrom mm_cb.core import runs\nfrom mm_cb.core.errors import UserError\n"
    head += f"out = Path({str(out)!r})\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = [sys.executable, "-c", f"{head}try:\n    {code}\nexcept UserError as e:\n    print(e)"]
    return subprocess.run(told, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def test_a_run_is_not_read_while_another_process_writes_it(out):
    read = "with runs.unwritten(out): print('read')"
    with RunDirectory(out, "demo", {}, 0) as run:
        with unwritten(out):  # by the process that writes it
            pass
        assert f"`{out}` is in use by another mm-cb process" in elsewhere(out, read)
        assert "is in use by another" in elsewhere(out, "runs.finished_run(out)")
        run.finish()
    with unwritten(out):  # several may read
        assert elsewhere(out, read) == "read"
        assert "is in use by another" in elsewhere(out, "with runs.held(out): print('written')")
    with held(out):
        assert "is in use by another" in elsewhere(out, read)
    assert elsewhere(out, "with runs.held(out): print('written')") == "written"


def test_a_run_is_read_where_nothing_can_be_written(out):
    with RunDirectory(out, "demo", {}, 0) as run:
        run.finish()
    (out / ".lock").unlink()
    before = sorted(out.iterdir())
    with unwritten(out):
        assert sorted(out.iterdir()) == before


def test_a_run_that_has_not_ended_names_the_command_that_goes_on(out):
    with RunDirectory(out, "demo", {}, 0):
        pass
    with pytest.raises(UserError, match="has not ended; give its `mm-cb demo` again"):
        finished_run(out)


@pytest.mark.parametrize(
    "write", [lambda path: write_bytes(path, b"half"), lambda path: save_png(torch.zeros(3, 2, 2), path)]
)
def test_leftovers_of_a_killed_process_are_swept(out, write):
    if not (child := os.fork()):
        with RunDirectory(out, "demo", {}, 0) as run:
            path = run.stage("images") / "a.png"
            os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
            write(path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [entry.suffix for entry in (out / "images").iterdir()] == [files.TEMPORARY_SUFFIX]
    with RunDirectory(out, "demo", {}, 0):
        assert list((out / "images").iterdir()) == []


def test_a_run_killed_before_run_json_is_no_obstacle(out):
    out.mkdir()
    (out / ".lock").write_text("")
    (out / f".run.json.1{files.TEMPORARY_SUFFIX}").write_text("{")
    with RunDirectory(out, "demo", {}, 0) as run:
        assert not run.finished
    assert sorted(entry.name for entry in out.iterdir()) == [".lock", "run.json"]


def test_other_code_is_noted_when_a_run_goes_on(out):
    RunDirectory(out, "demo", {}, 0).open().close()
    content = read_run(out)
    content["versions"]["torch"] = "0.0.1"
    write_json(out / "run.json", sealed(content))
    with pytest.warns(UserWarning, match=r"versions\.torch"):
        RunDirectory(out, "demo", {}, 0).open().close()
    assert read_run(out)["resumed"][0]["versions"]["torch"] != "0.0.1"


def test_another_revision_is_noted_when_a_run_goes_on(out, monkeypatch):
    monkeypatch.setattr("mm_cb.core.provenance.git_revision", lambda: "a" * 40)
    RunDirectory(out, "demo", {}, 0).open().close()
    RunDirectory(out, "demo", {}, 0).open().close()
    monkeypatch.setattr("mm_cb.core.provenance.git_revision", lambda: "b" * 40)
    with pytest.warns(UserWarning, match="git"):
        RunDirectory(out, "demo", {}, 0).open().close()
    assert [entry.get("git") for entry in read_run(out)["resumed"]] == [None, "b" * 40]


def test_a_folder_that_cannot_be_made_is_the_users_to_choose_again():
    with pytest.raises(UserError, match="must be writable"):
        RunDirectory(Path("/proc/no/such/folder"), "demo", {}, 0).open()


def test_a_run_that_fails_before_it_made_anything_leaves_the_directory_to_the_corrected_command(out):
    with pytest.raises(UserError, match="no such adapter"), RunDirectory(out, "attack", {"adapter": "typo"}, 0):
        raise UserError("no such adapter")
    assert not out.exists()
    with pytest.raises(UserError, match="later"), RunDirectory(out, "attack", {"adapter": "right"}, 0) as run:
        (run.stage("parts") / "one.json").write_text("{}")
        raise UserError("later")
    with pytest.raises(UserError, match="another run's results"):
        RunDirectory(out, "attack", {"adapter": "typo"}, 0).open()


def test_of_a_refused_run_nothing_is_left_where_the_folder_was_there_or_an_input_was_not(out):
    with pytest.raises(UserError, match="must be a readable file"):
        RunDirectory(out, "attack", {}, 0, inputs=[out / "none.jsonl"]).open()
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="no such adapter"), RunDirectory(out, "attack", {}, 0):
        raise UserError("no such adapter")
    assert out.is_dir() and not list(out.iterdir())


def test_a_lock_whose_file_was_given_up_meanwhile_is_none(out, monkeypatch):
    """Another process may have made a new one by then: both would write."""
    lock = fcntl.flock

    def late(descriptor, how):
        (out / ".lock").unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="in use by another mm-cb process"):
        RunDirectory(out, "attack", {}, 0).open()


def test_what_another_run_inside_is_just_writing_is_left_alone(tmp_path):
    """Shards of one attack lie inside the whole run's directory, which each of them opens when it starts."""
    own = tmp_path / "parts" / f".a.json{files.TEMPORARY_SUFFIX}"
    shard = RunDirectory(tmp_path / "shards" / "0001-of-0002", "attack", {}, 0, inputs=[])
    with RunDirectory(tmp_path, "attack", {}, 0, inputs=[]) as whole:
        whole.stage("parts")
        shard.open()
    with shard as inner:
        writing = inner.stage("parts") / f".b.json{files.TEMPORARY_SUFFIX}"
        for file in (own, writing):
            file.write_text("half")
        with RunDirectory(tmp_path, "attack", {}, 0, inputs=[]):
            assert writing.exists() and not own.exists()


def test_other_input_files_are_one_phrase_and_hashes_are_not_printed(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(95)]
    for file in files:
        file.write_bytes(b"before")
    recipe = {"weights": "a" * 64}
    with RunDirectory(tmp_path / "run", "attack", recipe, 0, inputs=files) as run:
        write_json(run.path / "made.json", {})
    for file in files:
        file.write_bytes(b"after")
    with pytest.raises(UserError) as refused:
        RunDirectory(tmp_path / "run", "attack", {"weights": "b" * 64}, 0, inputs=files).open()
    assert "recipe.weights (aaaaaaaa... there, bbbbbbbb... here); the content of inputs.0.png and 94 more files" in str(
        refused.value
    )
    with pytest.raises(UserError, match=r'different in: command \("attack" there, "eval" here\)\. Give'):
        RunDirectory(tmp_path / "run", "eval", {"other": 1}, 1, inputs=files).open()


@pytest.mark.parametrize("link", ["circle", "circle/inside", "nowhere", "nowhere/inside", "itself"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, link):
    for name, to in {"circle": "other", "other": "circle", "nowhere": "gone", "itself": "itself"}.items():
        (tmp_path / name).symlink_to(to)
    named = f"{link.partition('/')[0]}` is a link to .*leads nowhere or in a circle"
    with pytest.raises(UserError, match=named):
        read_run(tmp_path / link)
    with pytest.raises(UserError, match=named):
        write_text(tmp_path / link / "file", "x")
    if "/" not in link:
        with pytest.raises(UserError, match=named):
            RunDirectory(tmp_path / link, "attack", {}, 0).open()


def test_a_link_that_leads_nowhere_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to("gone")
    for kind in ("model", "dataset"):
        with pytest.raises(UserError, match="`model` is a link to `gone`, which leads nowhere or in a circle"):
            fetch("model", ["*"], kind=kind)


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    for name in ("run.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"run\.json` must be a file, .* it is a pipe"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors` must be a file, .* it is a pipe"):
        file_sha256(tmp_path / "model.safetensors")
