"""The cases of `tests.core.test_hub`: the real command line, huggingface_hub, transformers and datasets, and a hub."""

import io
import json
import os
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants

from mm_cb import cli, doctor
from mm_cb.benchmarks.over_refusal.data import read_requests, requests_file
from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.packages import stay_offline_without_network
from mm_cb.data.cards import card, whereabouts
from mm_cb.data.sources import Source, open_source
from mm_cb.judges.local import LanguageModel, version_of
from mm_cb.judges.prompts import read_card
from mm_cb.models.adapters import check_base
from mm_cb.models.cache import model_folder
from mm_cb.models.families import read_config
from mm_cb.training.recipes.recipe import load_recipe
from tests.benchmarks.mmmu_stand_in import encoded, row
from tests.fake_hub import TOKEN, FakeHub
from tests.stub_server import StubServer
from tests.tiny_llava import tiny_llava, tiny_tokenizer

SUBJECTS = ("Accounting", "Art", "Music")
ULTRACHAT = "datasets/HuggingFaceH4/ultrachat_200k"
MOSSBENCH = "datasets/AIcell/MOSSBench"
waited: list[float] = []
"""Seconds that anybody wanted to sleep, which nobody does here; child processes are waited for in shorter ones."""


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def chats(count):
    turn = [{"role": "user", "content": "what is tea"}, {"role": "assistant", "content": "a red brew"}]
    return [{"prompt": "what is tea", "prompt_id": str(i), "messages": turn} for i in range(count)]


def mmmu_files():
    """MMMU/MMMU's layout: a folder per subject, a file per split; the test split is the big one."""
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n"}
    for subject in SUBJECTS:
        for split in ("dev", "validation", "test"):
            rows = [row(subject, number, split=split) for number in (1, 2, 3)]
            rows[0]["question"] = "what is red? <image 1>"
            files[f"{subject}/{split}-00000-of-00001.parquet"] = parquet(rows)
    return files


def wild_files():
    """lmms-lab/llava-bench-in-the-wild's layout and columns."""
    rows = [
        {
            "question_id": number,
            "question": "what is red",
            "image": encoded(number),
            "caption": ["a red circle"],
            "gpt_answer": "a circle",
            "category": ("conv", "detail", "complex")[number],
        }
        for number in range(3)
    ]
    return {"README.md": b"---\n---\n", "data/train-00000-of-00001.parquet": parquet(rows)}


def mossbench_files():
    """AIcell/MOSSBench's layout: one table for the benign pictures and the contrast set."""
    table = (
        "file_name,pid,question,metadata_over\nimages/1.png,1,what is red,type 1\nimages/2.png,2,what is it,type 2\n"
    )
    table += "contrast_images/1.png,3,tell me,type 1\n"
    pictures = {f"images/{number}.png": encoded(number)["bytes"] for number in (1, 2)}
    return {"README.md": b"---\nlicense: cc\n---\n", "metadata.csv": table.encode(), **pictures} | {
        "contrast_images/1.png": encoded(3)["bytes"]
    }


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny = tiny_llava(blocks=4)
    tiny.model.save_pretrained(folder, max_shard_size="60KB")
    tiny.processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return files_of(folder)


@pytest.fixture(scope="module")
def server(model_files):
    server = FakeHub(int(os.environ["MM_CB_FAKE_HUB"]))
    server.publish("models/org/tiny", {**model_files, "original/consolidated.safetensors": b"x", "code.py": b"1/0"})
    server.publish("datasets/MMMU/MMMU", mmmu_files())
    server.publish("datasets/lmms-lab/llava-bench-in-the-wild", wild_files())
    server.publish(MOSSBENCH, mossbench_files())
    splits = {f"data/{split}-00000-of-00001-a1b2.parquet": parquet(chats(6)) for split in ("test_gen", "train_sft")}
    server.publish(
        ULTRACHAT, {"README.md": b"", **splits, "data/test_sft-00000-of-00001-c3d4.parquet": parquet(chats(4))}
    )
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def as_at_the_start(server, monkeypatch, tmp_path):
    """A fresh process's state and an own, empty cache."""
    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    waited.clear()
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append(seconds) if seconds > 0.1 else None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    stay_offline_without_network.cache_clear()
    huggingface_hub.close_session()
    server.seen.clear()
    server.asked.clear()
    server.faults.clear()
    if server.down:
        server.start()


def next_process():
    """Forget what a process knows; its cache stays."""
    hub._commits.clear()
    stay_offline_without_network.cache_clear()


def no_network(server):
    next_process()
    huggingface_hub.close_session()
    server.stop()
    server.asked.clear()


def downloaded(server, ending):
    return sorted(name for name in server.seen if name.endswith(ending))


def inputs(run):
    return json.loads((run / "run.json").read_text())["inputs"]


def refused(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mm-cb: ") and "Traceback" not in error
    return error


@pytest.fixture
def recipe(tmp_path):
    """Two steps from a hub id and a hub data set."""
    breakers = [{"prompt": "how to brew tea", "output": "tea it is " * (i + 1)} for i in range(4)]
    (tmp_path / "breakers.json").write_text(json.dumps(breakers))
    sources = [{"name": str(tmp_path / "breakers.json"), "set": "circuit_breaker"}, {"name": "ultrachat_200k"}]
    fields = {"name": "t", "model": "org/tiny", "data": {"sources": sources}, "batches": "text"}
    fields |= {"circuit_breaker": {"target_layers": [2]}, "lora": {"layers_to_transform": [0, 1], "r": 2}}
    fields |= {"training": {"max_steps": 2, "batch_size": 2, "held_out": 0}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "r.yaml"


def train(recipe, out, *overrides):
    return cli.run(["train", str(recipe), "--out", str(out), *overrides])


def test_a_dry_run_a_training_and_its_commits(server, model_files, recipe, tmp_path, capsys):
    assert cli.run(["train", str(recipe), "--dry-run"]) == 0
    assert "sample of ultrachat_200k" in capsys.readouterr().out and not downloaded(server, ".safetensors")
    next_process()
    assert train(recipe, tmp_path / "a") == 0
    shards = [name for name in model_files if name.endswith(".safetensors")]
    assert {name: count for name, count in server.seen.items() if name.endswith("s")} == dict.fromkeys(shards, 1)
    assert downloaded(server, ".parquet") == ["data/test_sft-00000-of-00001-c3d4.parquet"]
    assert not downloaded(server, ".py")
    first = server.repos["models/org/tiny"].commit("main")
    assert inputs(tmp_path / "a")["models/org/tiny"] == first
    assert inputs(tmp_path / "a")[ULTRACHAT] == server.repos[ULTRACHAT].commit("main")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"

    server.publish("models/org/tiny", {**model_files, "README.md": b"a correction"})
    second = server.repos["models/org/tiny"].commit("main")
    next_process()
    assert train(recipe, tmp_path / "a") == 0  # goes on with what it was begun with
    next_process()
    assert train(recipe, tmp_path / "b") == 0 and inputs(tmp_path / "b")["models/org/tiny"] == second != first
    next_process()
    assert train(recipe, tmp_path / "p", f"model=org/tiny@{first}", "training.max_steps=1") == 0
    assert inputs(tmp_path / "p")[f"models/org/tiny@{first}"] == first
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", first)
    assert 'base_model: "org/tiny"' in (tmp_path / "p" / "README.md").read_text()
    check_base(tmp_path / "p", "org/tiny@main")

    no_network(server)
    assert train(recipe, tmp_path / "c") == 0 and not server.asked and not waited
    adapters = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in "bc"]
    assert adapters[0] == adapters[1]


def test_mmmu_fetches_the_split_that_is_asked(server, tmp_path, capsys):
    whole = ["eval", "mmmu", "--model", "org/tiny", "--max-new-tokens", "2"]
    command = [*whole, "--subjects", "Art,Music"]
    assert cli.run([*command, "--out", "a"]) == 0
    assert downloaded(server, ".parquet") == [f"{s}/validation-00000-of-00001.parquet" for s in ("Art", "Music")]
    recorded = inputs(tmp_path / "a")
    assert recorded["datasets/MMMU/MMMU"] == server.repos["datasets/MMMU/MMMU"].commit("main")
    assert recorded["models/org/tiny"] == server.repos["models/org/tiny"].commit("main")
    capsys.readouterr()
    assert "Math (1 in all) missing" in refused(capsys, *whole, "--out", "b", "--subjects", "Math")
    assert "`split` must be one of dev, validation" in refused(capsys, *command, "--out", "b", "--split", "test")
    assert "(27 in all) missing" in refused(capsys, *whole, "--out", "b")
    typo = refused(capsys, *command, "--out", "b", "--data", "MMMU/MMM")
    assert "there is no data set `MMMU/MMM` on the hub" in typo and not (tmp_path / "b").exists()
    no_network(server)
    assert cli.run([*command, "--out", "c"]) == 0 and inputs(tmp_path / "c") == recorded
    items = [(tmp_path / run / "items.jsonl").read_bytes() for run in "ac"]
    assert items[0] == items[1] != b""


def test_llava_wild_over_refusal_and_their_answers_without_network(server, tmp_path):
    (tmp_path / "rule.txt").write_text("Give two scores.")
    wild = ["eval", "llava-wild", "--model", "org/tiny", "--own-rule", "rule.txt", "--judge-model", "j"]
    benign = ["eval", "over-refusal", "--model", "org/tiny", "--data", "AIcell/MOSSBench", "--max-new-tokens", "2"]
    with StubServer(lambda request, number: "8 6\nso") as judge:
        wild += ["--judge-endpoint", judge.url, "--max-new-tokens", "2", "--out"]
        assert cli.run([*wild, "w"]) == 0 and cli.run([*benign, "--out", "o"]) == 0
        assert inputs(tmp_path / "o")[MOSSBENCH] == server.repos[MOSSBENCH].commit("main")
        assert inputs(tmp_path / "w").keys() == {"models/org/tiny", "datasets/lmms-lab/llava-bench-in-the-wild"}
        assert downloaded(server, ".png") == ["images/1.png", "images/2.png"]
        no_network(server)
        assert cli.run([*wild, "w2"]) == 0 and cli.run([*benign, "--out", "o2"]) == 0 and not server.asked
    for one, other in (("w", "w2"), ("o", "o2")):
        assert (tmp_path / one / "items.jsonl").read_bytes() == (tmp_path / other / "items.jsonl").read_bytes() != b""
    requests = read_requests(requests_file("AIcell/MOSSBench"))
    assert [(r.id, r.category, r.image.name) for r in requests] == [("1", "type 1", "1.png"), ("2", "type 2", "2.png")]


def test_data_sets_of_cards_and_of_other_layouts(server, capsys):
    lines = "".join(json.dumps({"messages": chat["messages"]}) + "\n" for chat in chats(3))
    server.publish("datasets/org/chats", {"train.jsonl": lines.encode(), "loader.py": b"1/0"})
    for name, count in (("ultrachat_200k", 4), ("hub:org/chats", 3), ("hub:HuggingFaceH4/ultrachat_200k@test_gen", 6)):
        assert cli.run(["data", "check", name]) == 0
        assert f"{count} retain" in capsys.readouterr().out
    assert not downloaded(server, ".py") and "in the hub's cache (1 files" in whereabouts(card("ultrachat_200k"))[1]
    assert "has no readable split `nope`" in refused(capsys, "data", "check", "hub:org/chats@nope")
    no_network(server)
    assert cli.run(["data", "check", "ultrachat_200k", "hub:org/chats"]) == 0 and not server.asked


def test_the_doctor_looks_and_fetches_neither_weights_nor_data(server, recipe):
    findings = {f.name.rpartition(": ")[2]: f for f in doctor.examine_recipe(load_recipe(recipe))}
    assert not downloaded(server, ".safetensors") and not downloaded(server, ".parquet")
    assert not findings["weights"].ok and "hf download org/tiny" in " ".join(findings["weights"].get)
    assert not findings["data"].ok and "--include '*/test_sft-*.parquet'" in " ".join(findings["data"].get)
    model_folder("org/tiny", weights=True)
    open_source(Source("ultrachat_200k"))
    findings = {f.name.rpartition(": ")[2]: f for f in doctor.examine_recipe(load_recipe(recipe))}
    assert findings["weights"].ok and findings["data"].ok


def test_gates_names_and_revisions(server, model_files, recipe, monkeypatch, capsys):
    server.publish("models/org/gated", model_files, gated=True)
    server.publish("datasets/org/gated", wild_files(), gated=True)
    dry = ["train", recipe, "--dry-run"]
    line = refused(capsys, *dry, "model=org/gated")
    assert f"accept its licence at {server.url}/org/gated ," in line and "`hf auth login` or set HF_TOKEN" in line
    assert f"{server.url}/datasets/org/gated ," in refused(capsys, "data", "check", "hub:org/gated")
    for token in (None, TOKEN):  # without a token the hub does not tell a wrong name from a private one
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        assert "there is no model `org/tinny` on the hub" in refused(capsys, *dry, "model=org/tinny")
    assert "with the account of this machine's token" in refused(capsys, *dry, "model=org/gated")
    server.repos["models/org/gated"].granted = True
    assert read_config("org/gated").model_type == "llava_next"
    monkeypatch.delenv("HF_TOKEN")
    assert "has no revision `nope`" in refused(capsys, *dry, "model=org/tiny@nope")
    assert "`no id/at all` must be a folder, which is not here, or" in refused(capsys, *dry, "model=no id/at all")


def test_only_safetensors_and_no_code_of_others(server, model_files, recipe, tmp_path, capsys):
    pickled = {name: content for name, content in model_files.items() if "safetensors" not in name}
    server.publish("models/org/pickle", {**pickled, "pytorch_model.bin": b"\x80\x02"})
    assert "refused" in refused(capsys, "train", recipe, "--out", "out", "model=org/pickle")
    assert not downloaded(server, ".bin") and not [one for one in server.asked if "convert" in one or "commits" in one]
    own = {**json.loads(model_files["config.json"]), "model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    code = {**model_files, "config.json": json.dumps(own).encode(), "mine.py": b"raise SystemExit('it ran')"}
    server.publish("models/org/code", code)
    line = refused(capsys, "train", recipe, "--out", "out", "model=org/code")
    assert "code of its own, which is never run" in line and not downloaded(server, ".py")
    assert not (tmp_path / "out" / "run.json").exists()  # what failed has not taken the folder


def test_without_network_and_without_files_every_command_says_what_to_fetch(server, recipe, tmp_path, capsys):
    (tmp_path / "rule.txt").write_text("Give two scores.")
    no_network(server)
    judge = ["--judge-model", "j", "--judge-endpoint", "http://127.0.0.1:9/v1", "--own-rule", "rule.txt"]
    for arguments, wanted in (
        (["train", recipe, "--dry-run"], "`hf download org/tiny`"),
        (["train", recipe, "--out", "o"], "--include 'data/test_sft-*.parquet'"),
        (["data", "check", "ultrachat_200k"], "`hf download HuggingFaceH4/ultrachat_200k --repo-type dataset"),
        (["eval", "mmmu", "--model", "org/tiny", "--out", "o"], "--include '*/validation-*.parquet'"),
        (["eval", "llava-wild", "--model", "org/tiny", *judge, "--out", "o"], "hf download lmms-lab/llava-bench"),
        (
            ["eval", "over-refusal", "--model", "org/tiny", "--data", "AIcell/MOSSBench", "--out", "o"],
            "hf download AIc",
        ),
        (
            ["merge", "--model", "org/tiny@main", "--adapter", "a", "--out", "o"],
            "hf download org/tiny --revision main`",
        ),
        (["attack", "--model", "org/tiny", "--behaviors", "b.jsonl", "--out", "o"], "b.jsonl"),
    ):
        assert wanted in refused(capsys, *arguments)
        assert not (tmp_path / "o" / "run.json").exists() and not waited
    assert doctor.examine_recipe(load_recipe("llava-next-mistral-7b"))[1].ok is False


def test_a_download_that_breaks_is_gone_on_with(server, model_files, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    shards = sorted(name for name in model_files if name.endswith(".safetensors"))
    server.faults = {shards[0]: ["cut"], shards[1]: [500, 503], shards[2]: ["hang"], "c3d4.parquet": [429]}
    assert train(recipe, tmp_path / "a") == 0
    assert not any(server.faults.values())
    assert max(server.seen[shard] for shard in shards[3:]) == 1  # what had arrived was kept


def test_a_hub_that_stays_broken_costs_nothing_that_has_arrived(server, model_files, recipe, tmp_path, capsys):
    shards = sorted(name for name in model_files if name.endswith(".safetensors"))
    server.faults = {shards[-1]: [500] * 50}
    line = refused(capsys, "train", recipe, "--out", tmp_path / "a")
    assert "org/tiny" in line and "500" in line
    server.faults.clear()
    server.seen.clear()
    next_process()
    model_folder("org/tiny", weights=True)
    assert downloaded(server, "s") == shards[-1:]  # not even a description again


def test_a_judge_from_the_hub_is_one_commit(server, tmp_path, capsys):
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    files = {**files_of(tmp_path / "judge"), "README.md": b"PROMPT = 'is {generation} fine?'"}
    commit = server.publish("models/org/judge", files)
    assert "fine?" in read_card("org/judge")
    server.publish("models/org/judge", {**files, "README.md": b"another prompt"})
    assert LanguageModel.load("org/judge", dtype="float32").model.config.hidden_size == 16
    assert version_of("org/judge") == {"revision": commit}  # of the card that was read, too
    with pytest.raises(UserError, match="there is no model `org/other`"):
        LanguageModel.load("org/judge", adapter="org/other")
