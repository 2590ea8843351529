"""A sealed record is read as it was written or refused by name."""

import json

import pytest

from mm_cb.core.errors import UserError
from mm_cb.core.files import write_json
from mm_cb.core.runs import RunDirectory, read_run
from mm_cb.core.seal import SEAL, refuse_changed, sealed

RECORD = {"a": [1, 2.5, None], "b": {"x": "é\udc80", "y": True}}


def leaves(value, path=()):
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in leaves(inner, (*path, key))]
    return [path]


def put(record, path, value):
    *above, last = path
    for key in above:
        record = record[key]
    record[last] = value


@pytest.mark.parametrize("needed", [True, False])
def test_a_record_is_read_whatever_the_order_and_layout_of_its_keys(tmp_path, needed):
    write_json(tmp_path / "a.json", dict(reversed(sealed(RECORD).items())))
    refuse_changed(json.loads((tmp_path / "a.json").read_text()), "it", needed=needed)


def test_only_records_of_earlier_versions_may_lack_a_seal():
    refuse_changed(RECORD, "it", needed=False)
    with pytest.raises(UserError, match="it was changed after it was written"):
        refuse_changed(RECORD, "it", needed=True)


def test_every_value_of_run_json_is_under_its_seal(tmp_path):
    recipe = {"steps": 3, "subject": "rr", "fiction": False, "options": {"k": 1}}
    with RunDirectory(tmp_path / "run", "attack", recipe, 5) as run:
        run.finish()
    file = tmp_path / "run" / "run.json"
    held = json.loads(file.read_text())
    assert read_run(file.parent) == {key: value for key, value in held.items() if key != SEAL}
    for path in [one for one in leaves(held) if one != ("schema",)]:
        changed = json.loads(file.read_text())
        put(changed, path, "other" if path[-1] != "seed" else 6)
        write_json(file, changed)
        with pytest.raises(UserError, match=r"run\.json`(: `| was changed after it was written)"):
            read_run(file.parent)
        write_json(file, held)
    write_json(file, {key: value for key, value in held.items() if key != SEAL})
    with pytest.raises(UserError, match="was changed after it was written"):
        read_run(file.parent)


def test_a_changed_seed_does_not_resume_and_an_earlier_versions_run_does(tmp_path):
    RunDirectory(tmp_path, "attack", {"steps": 3}, 5).open().close()
    file = tmp_path / "run.json"
    held = json.loads(file.read_text())
    write_json(file, {**held, "seed": 6})
    with pytest.raises(UserError, match="was changed after it was written"):
        RunDirectory(tmp_path, "attack", {"steps": 3}, 6).open()
    del held[SEAL]
    write_json(file, {**held, "schema": 1})
    with RunDirectory(tmp_path, "attack", {"steps": 3}, 5) as run:
        run.finish()
    assert read_run(tmp_path)["ended"]


@pytest.mark.parametrize("use", [read_run, lambda path: RunDirectory(path, "attack", {}, 0).open().close()])
def test_a_finished_run_knows_the_files_that_nothing_writes_anew(use, tmp_path):
    kept = ("behaviors.jsonl", "curves.json")
    with RunDirectory(tmp_path, "attack", {}, 0) as run:
        for name in (*kept, "items.jsonl"):
            (tmp_path / name).write_text("[]\n")
        run.finish(files=kept)
    (tmp_path / "items.jsonl").write_text("judged again\n")
    use(tmp_path)
    for name in kept:
        (tmp_path / name).write_text("[ ]\n")
        with pytest.raises(UserError, match=rf"{name}` was changed after it was written; put the file back"):
            use(tmp_path)
        (tmp_path / name).unlink()  # whoever shares a run may leave the requests out
        use(tmp_path)
