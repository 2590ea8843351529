import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from image_attacks import linf_255
from mm_cb import cli
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.outputs import best_pictures
from mm_cb.attacks.refusals import refuse_unsayable
from mm_cb.attacks.refused_settings import refuse_idle
from mm_cb.attacks.run import attack as attack_in_python
from mm_cb.attacks.shards import Shard, launched, launched_device
from mm_cb.attacks.threats import Threat
from mm_cb.attacks.transfer import run_transfer
from mm_cb.attacks.verify import verify_run
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress
from mm_cb.core.runs import RunDirectory, file_sha256, read_jsonl, read_run, write_jsonl
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.inference.source import ModelSource
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics.results import write_results
from mm_cb.models import load_model
from mm_cb.report import write_report
from tests.attacks.helpers import BEHAVIORS, attack, first_behaviors, save_adapter
from tests.core.test_runs import is_locked


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return attack(tmp_path_factory.mktemp("attack") / "run", BEHAVIORS, batch=8, max_new_tokens=32)


def test_a_run_holds_what_the_contract_names(finished):
    items = read_jsonl(finished / "items.jsonl")
    assert len(items) == 12 and {i["subject"] for i in items} == {"base"}
    assert {i["outcome"] for i in items} <= {"harmful", "gibberish", "refusal", "other"}
    for item in items:
        selected = finished / "images" / f"{safe_id(item['id'])}.png"
        assert linf_255(selected, finished / item["clean_image"]) <= 8
    measured = json.loads((finished / "results.json").read_text())["measurements"]
    assert any(m["metric"] == "compliance" and m["condition"] == "pgd" and m["n"] == 12 for m in measured)
    assert json.loads((finished / "run.json").read_text())["ended"]


def test_the_same_command_again_repeats_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    attack(finished, BEHAVIORS, batch=8, max_new_tokens=32)
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {p.name for p in before if before[p] != after[p]}
    assert changed <= {"run.json"}


@pytest.mark.parametrize("name", ["protocol.json", "checks.json", "curves.json", "behaviors.jsonl"])
def test_a_finished_run_that_lacks_a_file_is_not_taken_for_done(finished, tmp_path, name):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError, match=rf"`run` lacks {name}, which its command wrote.* another `--out`"):
        attack(run, BEHAVIORS, batch=8, max_new_tokens=32)
    with pytest.raises(UserError, match=rf"`run` lacks {name}.* Nothing was judged"):
        rejudge(run, open_judge(JudgeOptions("refusal-strings")), progress=Progress())
    assert not (run / "judgements").exists()


def test_a_report_of_an_attack_alone_claims_nothing(finished, tmp_path):
    write_report([finished], tmp_path / "report.html")
    assert "No claim" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "changes", [{"threat": Threat(levels=9)}, {"steps": 3}, {"seed": 1}, {"attacks": "noise"}, {"batch": 2}]
)
def test_another_attacks_directory_is_refused(finished, changes):
    with pytest.raises(UserError, match="another run's results"):
        attack(finished, BEHAVIORS, **{"batch": 8, "max_new_tokens": 32} | changes)


def test_an_adapter_whose_weights_changed_is_another_run(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    with RunDirectory(tmp_path / "out", "attack", {}, 0, inputs=ModelSource("miniature", str(adapter)).weights()):
        pass
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(UserError, match="another run's results"):
        RunDirectory(tmp_path / "out", "attack", {}, 0, inputs=ModelSource("miniature", str(adapter)).weights()).open()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return first_behaviors(tmp_path_factory.mktemp("three"), 3)


@pytest.mark.parametrize("key", ["prompt", "target"])
def test_texts_beyond_the_models_positions_are_refused_before_anything_is_attacked(three, tmp_path, key):
    records = [json.loads(line) for line in three.read_text().splitlines()]
    records[2] |= {key: "glow stone " * 300, "image": None}
    write_jsonl(tmp_path / "long.jsonl", [record | {"image": None} for record in records])
    named = rf"behaviour '{records[2]['id']}' is too long .* has \d{{3,4}} tokens, the model has 512 positions"
    with pytest.raises(UserError, match=named):
        attack(tmp_path / "out", tmp_path / "long.jsonl")
    assert not (tmp_path / "out" / "parts").exists()


def test_shards_gathered_are_the_unsharded_run(three, tmp_path):
    def part(out, **more):
        settings = {"chain": True, "iterates": 1, "samples": 1, "max_new_tokens": 2}
        return attack(tmp_path / out, three, "pgd,apgd,typographic", **settings, **more)

    whole, sharded = part("whole"), tmp_path / "sharded"
    part("sharded", shard=Shard(2, 2))
    with pytest.raises(UserError, match="not finished: 1/2"):
        part("sharded")
    with pytest.raises(UserError, match=r"`--shard 1/3` divides .* of which there are 2: give a shard i/2, or another"):
        part("sharded", shard=Shard(1, 3))
    part("sharded", shard=Shard(1, 2))
    with pytest.raises(UserError, match="another run's results"):
        part("sharded", shard=Shard(1, 2), threat=Threat(levels=9))
    part("sharded")
    for name in ("items.jsonl", "results.json", "curves.json", "checks.json", "protocol.json"):
        assert (sharded / name).read_bytes() == (whole / name).read_bytes(), name
    for file in (path for path in whole.glob("images/**/*") if path.is_file()):
        assert (sharded / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    with pytest.raises(UserError, match="gathered already"):
        part("sharded", shard=Shard(1, 2))


def test_more_shards_than_behaviours_gather_to_the_unsharded_run(three, tmp_path, capsys):
    whole, sharded, tiny = tmp_path / "whole", tmp_path / "sharded", {"steps": 1, "max_new_tokens": 2}
    attack(whole, three, **tiny)
    for index in (5, 2, 1):
        attack(sharded, three, **tiny, shard=Shard(index, 5))
    assert "shard 5/5 is empty, so it is done" in " ".join(capsys.readouterr().out.split())
    (sharded / "shards" / "0003-of-0005").mkdir()  # as of a shard that failed before it made anything
    with pytest.raises(UserError, match=r"not finished: 3/5\."):
        attack(sharded, three, **tiny)
    attack(sharded, three, **tiny, shard=Shard(3, 5))
    assert [path.name[:4] for path in sorted((sharded / "shards").iterdir())] == ["0001", "0002", "0003"]
    attack(sharded, three, **tiny)
    for name in ("items.jsonl", "results.json", "curves.json", "checks.json", "protocol.json"):
        assert (sharded / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_chain_of_attacks_has_a_worst_case_and_never_counts_relaxations(three, tmp_path):
    out = attack(tmp_path / "run", three, "pgd,pgd_long,apgd,embedding", chain=True, iterates=1, batch=8)
    items = read_jsonl(out / "items.jsonl")
    measured = json.loads((out / "results.json").read_text())["measurements"]
    worst = next(m for m in measured if m["condition"] == "worst_case" and m["split"] == "all")
    assert worst["counts"]["images_tried"] == sum(len(i["candidates"]) for i in items if i["condition"] != "embedding")
    assert {i["condition"] for i in items if i["relaxation"]} == {"embedding"}
    checks = {check["name"]: check["passed"] for check in json.loads((out / "checks.json").read_text())}
    assert len(checks) == 2 and all(checks.values())
    assert json.loads((out / "protocol.json").read_text())["k"] == {
        **{"pgd": 2, "pgd_long": 2, "apgd": 2},
        "embedding": 1,
    }


def test_transfer_judges_both_ways_from_the_same_files(three, tmp_path):
    attack(tmp_path / "a", three)
    attack(tmp_path / "b", three, system="answer in one word")  # another subject, of the same weights
    with pytest.raises(UserError, match="two models"):
        run_transfer(tmp_path / "a", tmp_path / "a", three, tmp_path / "out")
    run_transfer(tmp_path / "a", tmp_path / "b", three, tmp_path / "out")
    found = {(i["condition"], i["subject"], i["id"]): i for i in read_jsonl(tmp_path / "out" / "items.jsonl")}
    assert len(found) == 4 * 3
    for run in ("a", "b"):  # who judges his own pictures finds what his run found
        for made in read_jsonl(tmp_path / run / "items.jsonl"):
            item = found[f"from_{made['subject']}", made["subject"], made["id"]]
            assert item["loss"] == pytest.approx(made["loss"], abs=1e-4) and item["outcome"] == made["outcome"]


def test_runs_without_pictures_cannot_be_transferred(three, tmp_path):
    attack(tmp_path / "a", three, attacks="embedding", steps=1)
    with pytest.raises(UserError, match="attacked picture of every behaviour"):
        run_transfer(tmp_path / "a", tmp_path / "a", three, tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/10000", "1/99999999999", "1/" + "9" * 5000]
)
def test_shards_that_are_none(text):
    with pytest.raises(UserError, match="--shard"):
        Shard.parse(text)


TELLS = """
import os, sys
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    file.write('{"RANK": "%(RANK)s", "LOCAL_RANK": "%(LOCAL_RANK)s", "WORLD_SIZE": "%(WORLD_SIZE)s"}' % os.environ)
"""


@pytest.mark.slow
def test_two_processes_of_a_launcher_attack_what_one_attacks(three, tmp_path, monkeypatch):
    """Started as a user with two GPUs starts them, and their work in turn: the ranks never talk.

    One that dies costs its own part alone.
    """
    root = Path(__file__).parents[2]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(root / "scripts" / "launch" / "ddp.yaml")]
    (tmp_path / "tells.py").write_text(TELLS)
    command = [sys.executable, *launch, f"--main_process_port={port}", "-m", "tells", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = ["--epsilon", "8/255", "--max-new-tokens", "8", "--batch", "1"]
    for rank in (0, 1):
        with monkeypatch.context() as patched:
            for name, value in json.loads((tmp_path / f"{rank}.json").read_text()).items():
                patched.setenv(name, value)
            assert cli.run([*attack_arguments(three, tmp_path / "two"), *settings, "--shard", "auto"]) == 0
    shards = sorted(path.name for path in (tmp_path / "two" / "shards").iterdir())
    assert shards == ["0001-of-0002", "0002-of-0002"]
    for out in ("two", "one"):  # the first gathers, the second attacks alone
        assert cli.run([*attack_arguments(three, tmp_path / out), *settings]) == 0
    for name in ("items.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_shard_hashes_the_weights_once_and_without_the_lock(tmp_path, monkeypatch):
    """Weights of 14 GB take longer than the other shards wait for the whole run's lock."""
    behaviors, out, hashed = first_behaviors(tmp_path, 2), tmp_path / "out", []

    def slow_hash(file):
        hashed.append((Path(file).name, is_locked(out)))
        return file_sha256(file)

    monkeypatch.setattr("mm_cb.core.runs.file_sha256", slow_hash)
    attack(out, behaviors, "no_attack", shard=Shard(1, 2))
    assert hashed.count(("model.safetensors", False)) == 1 and not any(locked for _, locked in hashed)
    monkeypatch.undo()
    shard = out / "shards" / "0001-of-0002"
    assert read_run(shard)["inputs"] == read_run(out)["inputs"] and "model.safetensors" in read_run(out)["inputs"]


def test_shards_as_a_launcher_says():
    assert launched({"RANK": "1", "WORLD_SIZE": "4"}) == Shard(2, 4)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert launched(slurm) == Shard(3, 3)
    assert launched(slurm | {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "4"}) == Shard(3, 3)
    with pytest.raises(UserError, match="accelerate launch"):
        launched({})
    for wrong in (
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
    ):
        with pytest.raises(UserError, match=f"{int(wrong['RANK']) + 1} of {wrong['WORLD_SIZE']}"):
            launched(wrong)
    with pytest.raises(UserError, match="7 of 3; number a job array without gaps"):
        launched(slurm | {"SLURM_ARRAY_TASK_ID": "7"})


def test_a_gpu_for_each_process_of_a_launcher(monkeypatch):
    assert launched_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert launched_device("cuda") == "cuda:2" and launched_device("cpu") == "cpu"


def test_an_early_stop_without_a_judge_is_refused(three, tmp_path):
    with pytest.raises(UserError, match="needs a judge"):
        attack(tmp_path / "out", three, model="elsewhere", early_stop=True, iterates=1)


def test_long_targets_from_a_hijack_of_the_base(three, tmp_path, capsys):
    attack(tmp_path / "base", three)
    records = [i | {"outcome": "refusal"} for i in read_jsonl(tmp_path / "base" / "items.jsonl")]
    items = [i | {"outcome": "harmful", "completion": f"{i['target']} take ash ."} for i in records[:2]]
    write_jsonl(tmp_path / "base" / "items.jsonl", [*items, *records[2:]])
    write_results(tmp_path / "base" / "results.json", [])
    attack(tmp_path / "long", three, attacks="pgd_long", hijacks=tmp_path / "base")
    assert " ".join(capsys.readouterr().out.split()).count("hijacks: 2 of 3 behaviours") == 1
    said = {
        p.parent.name: json.loads(p.read_text())["response"] for p in (tmp_path / "long" / "images").glob("*/*.json")
    }
    forced = [said[safe_id(i["id"])] for i in items]
    assert forced == [i["completion"] for i in items] and len(said) == 3
    assert all(
        text not in forced and text for key, text in said.items() if key not in {safe_id(i["id"]) for i in items}
    )


@pytest.mark.parametrize("broken", [[], ["somebody else's"]])
def test_a_hijack_that_broke_nothing_asked_is_refused_in_one_line(three, tmp_path, capsys, broken):
    """Else the base's own continuations would be forced while run.json records `hijacks`."""
    run = {"command": "attack", "recipe": {"adapter": None}, "seed": 0, "inputs": {}, "ended": "now"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "run.json").write_text(json.dumps(run))
    where = {"metric": "compliance", "subject": "base", "condition": "pgd", "completion": "yes"}
    missed = [where | {"id": json.loads(line)["id"], "outcome": "refusal"} for line in three.read_text().splitlines()]
    harmful = [where | {"id": name, "outcome": "harmful"} for name in broken]
    write_jsonl(tmp_path / "base" / "items.jsonl", missed + harmful)
    write_results(tmp_path / "base" / "results.json", [])
    command = attack_arguments(three, tmp_path / "out", "--attack", "pgd_long", "--hijacks", str(tmp_path / "base"))
    assert cli.run(command) == 2 and not (tmp_path / "out").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert f"one of the 3 behaviours asked here; `{tmp_path / 'base'}` broke {len(broken)}, none of them asked" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_universal_run_reports_the_held_out_behaviours_apart_and_verifies(three, tmp_path, capsys, dtype):
    attack(tmp_path, three, attacks="universal", dtype=dtype, universal_train=1, batch=8)
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    found = {m["split"]: m["n"] for m in measured if m["condition"] == "universal" and m["metric"] == "compliance"}
    assert found["made_for"] == 1 and found["picture_held_out"] == 2
    assert "nothing is held out" not in capsys.readouterr().out
    assert not any(m["condition"] == "worst_case" for m in measured)
    assert all(check["passed"] for check in json.loads((tmp_path / "checks.json").read_text()))
    assert not any(row.disagreements for row in verify_run(tmp_path))


def test_a_universal_picture_without_held_out_behaviours_says_so(three, tmp_path, capsys):
    attack(tmp_path, three, attacks="universal", steps=1, max_new_tokens=2, universal_train=3)
    assert "nothing is held out" in " ".join(capsys.readouterr().out.split())


def test_a_behaviour_whose_gradient_is_zero_throughout_fails_a_check(three, tmp_path, monkeypatch):
    whole = TargetObjective.__call__

    def first_row_detached(self, pixels):
        losses = whole(self, pixels)
        return torch.cat([losses[:1].detach(), losses[1:]])

    monkeypatch.setattr(TargetObjective, "__call__", first_row_detached)
    behaviors = three.with_name("two.jsonl")
    behaviors.write_text("\n".join(three.read_text().splitlines()[1:3]) + "\n")  # two pictures of one size
    attack(tmp_path, behaviors, max_new_tokens=2, batch=2)
    (failed,) = [c for c in json.loads((tmp_path / "checks.json").read_text()) if not c["passed"]]
    items = read_jsonl(tmp_path / "items.jsonl")
    assert "gradient" in failed["name"] and items[0]["id"] in failed["value"] and "1 at every step" in failed["value"]
    told = [json.loads((tmp_path / i["image"]).with_suffix(".json").read_text()).get("zero_gradients") for i in items]
    assert told == [1.0, None]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shard": Shard(1, 2)}, "leave out `--shard`"),
        ({"early_stop": True, "iterates": 1}, "`--early-stop`"),
        ({"attacks": "pgd,universal"}, "alone in its run"),
        ({"universal_train": 4}, "at most the number of behaviours, 3"),
        ({"attacks": "pgd", "universal_train": 1}, "is for `--attack universal` alone"),
        ({"attacks": "pgd", "balance": True}, "`--balance` is for .* does not read it"),
        ({"attacks": "pgd_long", "term_weight": 3.0}, "`--term-weight` is for"),
        ({"attacks": "pgd", "hijacks": Path("elsewhere")}, "`--hijacks` is for"),
        ({"attacks": "pgd,noise,embedding", "chain": True}, "`--chain` is for two or more"),
        ({"attacks": "apgd", "optimizer": "sign"}, "`--optimizer` is for"),
        ({"attacks": "typographic", "threat": Threat("patch", 255, 4)}, "`--norm` is for"),
        ({"attacks": "typographic", "threat": Threat(), "iterates": 2}, "`--iterates` is for"),
        ({"attacks": "noise", "iterates": 2, "early_stop": True}, "`--early-stop` is for"),
        ({"attacks": "embedding", "threat": Threat(), "samples": 2}, "`--samples` is for"),
        ({"attacks": "pgd", "steps": 2, "iterates": 50}, "`--iterates` must be at most `--steps`.* 50 of 2"),
        ({"attacks": "no_attack,pgd", "threat": Threat("linf", 0)}, "`--epsilon` must be at least 1/255"),
        ({"attacks": "apgd", "threat": Threat("patch", 0, 4)}, "`--epsilon` must be at least 1/255"),
        (
            {"attacks": "apgd", "threat": Threat("l2", 255, 800)},
            r"`--epsilon` 800 does not fit .* further apart than \d",
        ),
    ],
)
def test_what_a_run_cannot_do_is_refused(three, tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        attack(tmp_path, three, **{"attacks": "universal"} | changes)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        ("no_attack", {"steps": 5}, "--steps"),
        ("noise", {"steps": 5}, "--steps"),
        ("typographic,no_attack", {"restarts": 2, "threat": Threat("linf", 9)}, "--restarts and --epsilon"),
        ("pgd", {"temperature": 0.5}, "--temperature without `--samples`"),
        ("noise,pgd", {"steps": 5, "restarts": 2, "threat": Threat("linf", 9)}, ""),
        ("noise", {"steps": 5, "iterates": 2, "restarts": 2}, ""),
        ("gcg", {"steps": 5, "restarts": 2}, ""),
    ],
)
def test_a_budget_that_no_attack_reads_is_said(names, settings, said):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        refuse_idle(AttackConfig(**{"control": 0} | settings), names.split(","))
    assert [str(one.message) for one in told] == (
        [f"`--attack {names}` does not read {said}: nothing changes."] if said else []
    )


def test_shards_share_the_behaviours_without_overlap():
    parts = [Shard(i, 3).part(list(range(7))) for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == list(range(7))
    with pytest.raises(UserError, match="is empty"):
        Shard(3, 3).part([1, 2])


def attack_arguments(behaviors, out, *more):
    return ["attack", "--model", "miniature", "--behaviors", str(behaviors), "--out", str(out), "--steps", "1", *more]


WANTED = "`form` must hold `text`, an answer with `___` in its gaps, and `words`, two or more that differ"
FORMS = [
    *(
        (form, WANTED)
        for form in ("null", '"take ___"', '{"text": "take ___"}', '{"text": "take", "words": ["a", "b"]}')
    ),
    *(
        (f'{{"text": "take ___", "words": {words}}}', WANTED)
        for words in ('"ab"', '["a"]', '["a", "a"]', '["a", " "]', '["a", 1]', '["a", "___"]', "[]")
    ),
    ('{"text": "take ___", "words": ["a", "b"], "true": "a"}', WANTED),
    *(
        (f'{{"text": "take {gaps}", "words": ["a", "{word}"]}}', f"three underscores, got `{odd}`")
        for gaps, word, odd in (
            *(("____", "b", "____"), ("___ and __", "b", "__"), ("___ and _", "b", "_")),
            *(("______", "b", "______"), ("___ ___ ____.", "b", "____"), ("___", "__", "__")),
        )
    ),
    ('{"text": "<image> ___", "words": ["a", "b"]}', "image placeholder `<image>`"),
    ('{"text": "take ___", "words": ["a", "<image>"]}', "image placeholder `<image>`"),
]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{broken", "behaviors.jsonl:2"),
        ('{"id": "b", "prompt": "p", "target": "t", "image": "empty.png"}', "got an empty one"),
        ('{"id": "b", "prompt": "p", "target": "t", "image": "none.png"}', "none.png"),
        ('{"id": "b", "prompt": "p", "target": "t", "image": "a\\u0000b"}', "behaviors.jsonl:2"),
        ('{"id": "b", "prompt": "<image> p", "target": "t"}', "image placeholder `<image>`"),
        ('{"id": "b", "prompt": "p", "target": "t", "typographic_prompt": "<image> p"}', "image placeholder `<image>`"),
        ('{"id": "b", "prompt": "p", "target": "t", "facts": "<image>"}', "image placeholder `<image>`"),
        ('{"id": "b", "prompt": "p", "target": "t </s>"}', "must not hold the model's control token `</s>`"),
        ('{"id": "b", "prompt": "p [/INST]", "target": "t"}', "control token `[/INST]`"),
        ('{"id": "b", "prompt": "p [/INST]", "target": "t"}', "behaviors.jsonl:2: behaviour 'b' cannot be asked"),
        ('{"id": "b", "prompt": "p", "target": "t", "facts": " "}', "`facts` must be a non-empty text, got ' '"),
        ('{"id": "b", "prompt": "p", "target": "t", "fact": "a"}', "did you mean `facts`"),
        *((f'{{"id": "b", "prompt": "p", "target": "t", "form": {form}}}', expected) for form, expected in FORMS),
        *(
            (f'{{"id": "b", "prompt": "p", "target": "t", "harmless": {asked}}}', "`harmless` must hold two or more")
            for asked in ("null", '"ab"', "[]", '["a"]', '["a", "a"]', '["a", " "]', '["a", 1]')
        ),
        ('{"id": "b", "prompt": "p", "target": "t", "harmless": ["a", "<image>"]}', "image placeholder `<image>`"),
    ],
)
def test_bad_behaviours_end_with_exit_code_2_and_one_line(tmp_path, capsys, line, expected):
    (tmp_path / "empty.png").write_bytes(b"")
    good = '{"id": "a", "prompt": "p", "target": "t", "image": null}'
    (tmp_path / "behaviors.jsonl").write_text(f"{good}\n{line}\n")
    assert cli.run(attack_arguments(tmp_path / "behaviors.jsonl", tmp_path / "out")) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and expected in errors[0]


@pytest.mark.parametrize(
    ("attack", "field"), [("pgd_facts", "facts"), ("pgd_form", "form"), ("pgd_form_found", "harmless")]
)
def test_fields_that_a_behaviour_lacks_are_asked_for_before_a_model_is_loaded(tmp_path, capsys, attack, field):
    (tmp_path / "behaviors.jsonl").write_text('{"id": "a", "prompt": "p", "target": "t", "image": null}\n')
    adapter = str(Path("results/miniature_demo/rr").resolve())
    asked = attack_arguments(tmp_path / "behaviors.jsonl", tmp_path / "out", "--attack", attack, "--adapter", adapter)
    asked[asked.index("miniature")] = str(tmp_path / "none")
    assert cli.run(asked) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`{field}`" in line and "1 of 1, such as `a`" in line


def odd_pictures():
    """Files that Pillow opens, or begins to, and that are not the picture a user sees."""
    from tests.image_attacks.test_image_files import JPEG, RGB, encoded, png

    return {
        "16 bits per channel": png(2, 1, 16, 2, bytes(13)),
        "2 frames": encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]),
        "damaged": JPEG[: len(JPEG) * 2 // 3],
        "got text": b"hello",
        "at most 89478485 pixels": png(60000, 60000, 8, 2, b""),
    }


@pytest.mark.parametrize(("got", "data"), odd_pictures().items())
def test_odd_pictures_end_with_exit_code_2_and_one_line(tmp_path, capsys, got, data):
    (tmp_path / "odd.png").write_bytes(data)
    (tmp_path / "behaviors.jsonl").write_text('{"id": "a", "prompt": "p", "target": "t", "image": "odd.png"}\n')
    assert cli.run(attack_arguments(tmp_path / "behaviors.jsonl", tmp_path / "out")) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "behaviors.jsonl:1" in errors[0] and "odd.png" in errors[0] and got in errors[0]
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_budget_off_the_grid_and_a_behaviour_without_target_end_with_exit_code_2(tmp_path, capsys):
    (tmp_path / "behaviors.jsonl").write_text('{"id": "a", "prompt": "p", "image": null}\n')
    assert cli.run(attack_arguments(tmp_path / "behaviors.jsonl", tmp_path / "out")) == 2
    assert "['target']" in capsys.readouterr().err
    assert cli.run(attack_arguments(BEHAVIORS, tmp_path / "out", "--epsilon", "8.5/255")) == 2
    assert "n/255" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "tpu9"])
def test_a_device_that_is_not_there_ends_with_exit_code_2_and_one_line(tmp_path, capsys, device):
    assert cli.run(attack_arguments(BEHAVIORS, tmp_path / "out", "--device", device)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and device in errors[0]


def test_the_adaptive_attack_without_an_adapter_is_refused(tmp_path, capsys):
    assert cli.run(attack_arguments(BEHAVIORS, tmp_path / "out", "--attack", "pgd_adaptive")) == 2
    assert "--adapter" in capsys.readouterr().err


@pytest.mark.parametrize("shard", [(), ("--shard", "1/2")])
def test_a_typo_does_not_take_the_directory_from_the_corrected_command(three, tmp_path, capsys, shard):
    out, more = tmp_path / "out", (*shard, "--max-new-tokens", "2")
    assert cli.run(attack_arguments(three, out, "--adapter", str(tmp_path / "typo"), *more)) == 2
    assert "not an adapter" in capsys.readouterr().err
    assert cli.run(attack_arguments(three, out, "--model", str(tmp_path / "typo"), *more)) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not out.exists()
    assert cli.run(attack_arguments(three, out, *more)) == 0


def test_a_run_is_not_gone_on_with_after_a_picture_has_changed(three, tmp_path):
    out = attack(tmp_path / "out", three, "no_attack", max_new_tokens=2)
    pictures = [b.image for b in read_behaviors(three) if b.image is not None]
    kept = pictures[0].read_bytes()
    try:
        Image.new("RGB", Image.open(pictures[0]).size, "red").save(pictures[0])
        with pytest.raises(UserError, match="another run's results"):
            attack(out, three, "no_attack", max_new_tokens=2)
    finally:
        pictures[0].write_bytes(kept)


def test_a_chain_goes_on_from_pictures_that_were_searched():
    def item(condition, image, loss):
        return {"id": "a", "condition": condition, "image": image, "loss": loss, "outcome": "other"}

    items = [item("typographic", "t.png", 0.1), item("noise", "n.png", 0.2), item("pgd", "p.png", 0.9)]
    assert best_pictures(items) == {"a": "p.png"}


@pytest.mark.parametrize("shards", [1, 2])
def test_an_adapter_that_does_nothing_is_said_and_claimed_nothing_of(three, tmp_path, capsys, shards):
    adapter = save_adapter(tmp_path / "adapter", seed=0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    silent = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(silent, adapter / "adapter_model.safetensors")
    for index in range(1, shards + 1) if shards > 1 else ():
        attack(tmp_path / "run", three, adapter=str(adapter), shard=Shard(index, shards))
    run = attack(tmp_path / "run", three, adapter=str(adapter))
    assert "changes no logit of `miniature`" in " ".join(capsys.readouterr().out.split())
    assert all(item["adapter_changes_nothing"] for item in read_jsonl(run / "items.jsonl"))
    failed = [check for check in json.loads((run / "checks.json").read_text()) if not check["passed"]]
    assert "rr: adapter changes the model" in {check["name"] for check in failed}
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "No claim" in page and "an adapter that does nothing cannot defend" in page.lower()
    verify_run(run)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"target": "это ответ"}, "knows no part of its target 'это ответ', which is nothing but `<unk>`"),
        (
            {"prompt": "你好"},
            r"knows no part of its prompt '你好'.* \(\d+ words, among them \w+, .*\), or give another",
        ),
        ({"target": "the zzyx"}, None),
        ({"prompt": "zzyx, what is the stone?"}, None),
    ],
)
def test_texts_that_the_model_knows_no_part_of_are_refused_and_those_with_a_strange_word_are_not(change, told, capsys):
    model, (behavior, *_) = load_model("miniature"), read_behaviors(BEHAVIORS)
    asked = replace(behavior, id="strange", **change)
    if told is None:
        refuse_unsayable([behavior, asked], model)
        assert capsys.readouterr().err == capsys.readouterr().out == ""
        return
    with pytest.raises(UserError, match=f"behaviour 'strange': `miniature` {told}"):
        refuse_unsayable([behavior, asked], model)


@pytest.mark.parametrize("key", ["prompt", "target"])
def test_texts_that_are_mostly_unknown_to_the_model_are_said(key, capsys):
    model, (behavior, *_) = load_model("miniature"), read_behaviors(BEHAVIORS)
    refuse_unsayable([behavior, replace(behavior, id="strange", where="f:2", **{key: "bake the zzyx, quietly"})], model)
    told = "f:2: behaviour 'strange': 1 of 2 behaviours have a text that is mostly `<unk>` to the model"
    assert told in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attacks": []}, r"`attacks` must be the name of an attack, or a list of names, got \[\]"),
        ({"attacks": 3}, "`attacks` must be the name of an attack"),
        ({"attacks": ["pgd", 1]}, "`attacks` must be the name of an attack"),
        ({"device": 0}, r"`device` must be a text such as cpu or cuda:0, got 0 \(int\)"),
        ({"dtype": None}, "`dtype` must be float32, bfloat16 or float16, got None"),
        (
            {"model": torch.nn.Linear(1, 1)},
            "`model` must be a hub id, a folder's path or an embedded model's name, got",
        ),
        ({"behaviors": [{"id": "a"}]}, "`behaviors` must be a file of behaviours.* got list"),
        ({"out": None}, "`out` must be the path of a run directory, got NoneType"),
        ({"out": ""}, "`out` must be .* got an empty text"),
        ({"adapter": ""}, "`adapter` must be the path of a folder, got an empty text"),
        ({"config": {"steps": 2}}, "`config` must be an mm_cb.AttackConfig, got dict"),
        ({"step": 2}, "unknown setting of `attack` `step`, did you mean `steps`\\? valid: .*batch"),
        ({"shard": "1/2"}, "unknown setting of `attack` `shard`.* valid: .*steps"),
        ({"epsilon": 8}, r"`epsilon` is no setting of `attack`, it is said by `threat`: threat=mm_cb.Threat\(levels=8"),
        *(({name: 8}, "said by `threat`: threat=") for name in ("norm", "patch_size", "border_width")),
        ({"name": "noise"}, "`name` is no setting of `attack`, it is said by `attacks`: attacks='noise'"),
        ({"prompts_each": 2}, "unknown setting of `attack` `prompts_each`"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(given, message, tmp_path):
    usual = {"model": "miniature", "behaviors": "miniature", "out": tmp_path / "run"}
    with pytest.raises((TypeError, UserError), match=message):
        attack_in_python(**{**usual, **given})
    assert not (tmp_path / "run").exists()


def test_a_list_of_names_and_torchs_own_dtype_and_device_are_what_texts_are(three, tmp_path):
    small = {"steps": 1, "max_new_tokens": 2, "control": 0}
    own = {"attacks": ["no_attack", "noise"], "dtype": torch.bfloat16, "device": torch.device("cpu")}
    texts = {"attacks": "no_attack,noise", "dtype": "bfloat16", "device": "cpu"}
    for name, more in (("own", own), ("texts", texts)):
        attack_in_python("miniature", three, tmp_path / name, **more, **small)
    assert read_run(tmp_path / "own")["recipe"] == read_run(tmp_path / "texts")["recipe"]
