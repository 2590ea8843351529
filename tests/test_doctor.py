import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from mm_cb import doctor
from mm_cb.models import cache
from mm_cb.training.recipes.recipe import load_recipe
from tests.models.tiny import llava, qwen, qwen3_5
from tests.tiny_llava import tiny_llava

GIB = 2**30


@pytest.fixture
def seven():
    return load_recipe("llava-next-mistral-7b")


@pytest.fixture(autouse=True)
def no_data_sets(monkeypatch, tmp_path):
    """Whether this machine happens to have the public data sets is not the question here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MM_CB_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def found(findings):
    return {finding.name.rpartition(": ")[2]: finding for finding in findings}


def test_a_recipe_on_a_machine_without_gpu_says_what_is_missing_and_what_would_fit(seven, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = found(doctor.examine_recipe(seven))
    assert findings["adapter"].ok and "21 modules, 3,932,160 parameters" in findings["adapter"].detail
    memory = findings["memory"]
    assert not memory.ok and "no GPU here" in memory.detail
    assert "12 GiB: training.recompute=true" in memory.detail and "8 GiB: quantize=4bit" in memory.detail
    weights = findings["weights"]
    assert not weights.ok and weights.get == ("hf download llava-hf/llava-v1.6-mistral-7b-hf",)
    assert weights.source == "https://huggingface.co/llava-hf/llava-v1.6-mistral-7b-hf"


def test_every_data_source_of_a_recipe_is_a_finding_of_its_own(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    line = {"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    two.write_text(json.dumps({**line, "images": [], "set": "retain"}))
    named = ["xstest", str(one), str(two), "hub:nobody/nothing"]
    for data, problems in (
        ({"sources": [{"name": name} for name in named]}, named[:2] + named[3:]),
        (named[1:3], named[1:2]),
    ):
        found = doctor._needed_data(load_recipe("llava-next-mistral-7b").model_copy(update={"data": fields(data)}))
        assert len(found) == len(named if isinstance(data, dict) else data)
        assert [next(n for n in named if n.removeprefix("hub:") in f.detail) for f in found if not f.ok] == problems


def fields(data):
    from mm_cb.training.recipes.config import MixtureConfig

    return MixtureConfig(**data) if isinstance(data, dict) else data


@pytest.mark.parametrize(("free", "ok"), [(80, True), (12, False)])
def test_a_recipe_on_a_gpu(seven, monkeypatch, free, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    memory = found(doctor.examine_recipe(seven))["memory"]
    assert memory.ok == ok and f"{free}.0 GiB are free" in memory.detail
    assert ("this fits: training.recompute=true" in memory.detail) != ok


def test_an_extra_that_a_recipe_needs_is_a_problem_only_there(monkeypatch):
    real = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    assert found(doctor._extras())["extra `quant`"].ok is None
    needed = found(doctor.examine_recipe(load_recipe("llava-next-mistral-7b", ["quantize=4bit"])))["extra `quant`"]
    assert not needed.ok and needed.get == ("pip install -e '.[quant]'",)


def test_the_miniatures_recipe_is_ready():
    assert all(finding.ok for finding in doctor.examine_recipe(load_recipe("miniature")))


def test_absent_files_of_a_model(tmp_path):
    assert cache.absent_files("miniature") == []
    assert cache.absent_files("nobody/nothing") == ["config.json", "model.safetensors"]
    assert cache.absent_files(tmp_path) == ["config.json", "model.safetensors"]
    tiny_llava().model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert cache.absent_files(tmp_path) == []
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    assert cache.absent_files(tmp_path) == [shards[1].name]


def test_what_is_absent_and_not_asked_for_is_said_but_no_problem(monkeypatch, capsys):
    file = "data/a_very_long_path/" * 6 + "end.csv"
    findings = [doctor.Finding("model", None, "lacks config.json"), doctor.Finding("data", None, file)]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor.print_findings()
    out = capsys.readouterr().out
    assert out.count("absent") == 2 and "PROBLEM" not in out and not re.search(r"\bok\b", out)
    assert file in out.splitlines()[2]  # whole


@pytest.mark.parametrize("here", [False, True])
def test_a_look_at_the_machine_is_short_and_problems_come_first(here, monkeypatch, capsys):
    """With nothing on the machine, or a package that is gone besides: no more than a screen, each with its command."""
    monkeypatch.setattr(doctor, "guests", list)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    if not here:
        versions = doctor.provenance.package_versions()
        monkeypatch.setattr(doctor.provenance, "package_versions", lambda: versions | {"peft": None})
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor.print_findings() == here
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 80
    assert lines[0].startswith("peft") != here and ("PROBLEM" in lines[0]) != here
    for command in ("pip install -e '.[quant,gguf,data,judge]'", "mm-cb doctor --recipe RECIPE", "mm-cb data list"):
        assert f"    {command}" in lines


def test_a_terminal_of_one_column_is_written_to(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("a longer name of a finding", False, "why " * 9)])
    monkeypatch.setenv("COLUMNS", "1")
    doctor.print_findings()
    assert "why" in capsys.readouterr().out


def test_every_extra_that_a_command_reads_is_named():
    assert {f.name for f in doctor._extras()} == {f"extra `{name}`" for name in ("quant", "gguf", "data", "judge")}


def test_no_advice_installs_a_name_that_is_not_ours_on_an_index():
    """`mm-cb` is not published: another's package of that name would be installed."""
    root = Path(doctor.__file__).parent
    found = [line for path in root.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    advice = [line for line in found if "pip install" in line]
    assert len(advice) >= 4 and all("pip install -e ." in line or "pip install -e '.[" in line for line in advice)


def test_safetensors_alone_and_no_foreign_code_on_every_path():
    """Nothing unpickles, and every reader of transformers is told to run no code of the model's own."""
    root = Path(doctor.__file__).parent
    calls = re.compile(r"Auto\w+\.from_pretrained\((?:[^()]|\([^()]*\))*\)")
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "pickle" not in text, path
        for call in calls.findall(text):
            assert "trust_remote_code=False" in call, (path, call)
            assert "AutoModel" not in call or "use_safetensors=True" in call, (path, call)


# a quick look at a model


def test_a_model_that_sees_is_looked_at_without_its_weights(tmp_path):
    from mm_cb.attacks.quick_look import look

    tiny_llava().model.config.save_pretrained(tmp_path)
    rows = {name: (ok, detail) for name, ok, detail in look(str(tmp_path)).rows}
    assert "LlavaNext (llava_next), sees pictures" in rows["family"][1] and rows["weights"][0] is None
    assert rows["attack"] == (True, "by pictures and texts") and "GiB in float32" in rows["memory to attack"][1]
    assert rows["train"][1].endswith("recipe llava-next-mistral-7b, with layers of its own")
    assert rows["memory to train"][0]


def test_a_quick_look_says_where_no_command_would_take_the_processor(tmp_path):
    from mm_cb.attacks.quick_look import look

    model = tiny_llava()
    model.model.config.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert "processor" not in {row[0] for row in look(str(tmp_path)).rows}
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 7}))
    (row,) = (row for row in look(str(tmp_path)).rows if row[0] == "processor")
    assert row[1] is False and "must have `patch_size`" in row[2]


@pytest.mark.parametrize(
    ("model", "blocks", "recipe", "layers"),
    [
        ("miniature", None, "miniature", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None, "qwen2.5-vl-7b", None),
        ("qwen2_5_vl", 28, "qwen2.5-vl-7b", None),  # a tuned copy, in a folder
        ("qwen2_5_vl", 36, "qwen2.5-vl-7b", ([18], [16, 17, 18])),
        ("qwen2_vl", 28, "qwen2-vl-7b", None),
        ("qwen3_5", 24, "qwen3.5-9b", ([12], [10, 11, 12])),
        ("llava", 40, "llava-1.5-7b", ([20], [18, 19, 20])),  # as deep as Pixtral, of the same type, another family
        ("llama", 30, "llama-3-8b-instruct", ([9, 18], list(range(19)))),
    ],
)
def test_a_quick_look_ends_with_a_command_that_trains_this_model(model, blocks, recipe, layers, tmp_path, monkeypatch):
    from mm_cb.attacks.quick_look import look
    from mm_cb.training.planning.plan import make_plan

    if blocks is not None:
        if model == "llama":
            LlamaConfig(num_hidden_layers=blocks, hidden_size=32, intermediate_size=64).save_pretrained(tmp_path)
        else:
            make = {"llava": llava, "qwen3_5": qwen3_5}.get(model, partial(qwen, model))
            own = {"layer_types": None} if model == "qwen3_5" else {}
            make("pil", num_hidden_layers=blocks, **own)[1].save_pretrained(tmp_path)
        model = str(tmp_path)
    command, named, *fields, flag, out = look(model).train
    assert (command, named, flag, out) == ("train", recipe, "--out", "runs/rr")
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": []}
    rows = [json.dumps({"id": s, **line, "set": s}) for s in ("circuit_breaker", "retain")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    planned = load_recipe(named, fields)
    make_plan(planned)  # refuses layers and modules that the model has not
    assert planned.model == model
    if layers is not None:
        assert (planned.circuit_breaker.target_layers, planned.lora.layers_to_transform) == layers
    assert any("target_layers" in field for field in fields) == (layers is not None)


@pytest.mark.parametrize("free", [2**30, 2**40])
def test_a_line_for_a_cpu_is_printed_only_where_it_would_fit(free, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("mm_cb.core.provenance.available_memory_bytes", lambda: free)
    assert doctor.print_findings(model="llava-hf/llava-1.5-7b-hf")
    told = " ".join(capsys.readouterr().out.partition("\nnext\n")[2].split())
    assert ("device=cpu" in told) == (free == 2**40) and ("on a GPU" in told) == (free == 2**30)


def test_a_recipe_is_asked_for_what_it_needs_and_for_no_other_model_or_data(capsys):
    assert doctor.print_findings("miniature")
    out = capsys.readouterr().out
    assert "hf download" not in out and out.rstrip().endswith("mm-cb train miniature --dry-run")


def test_a_published_shape_has_its_recipes_memory(seven):
    from mm_cb.attacks.quick_look import look
    from mm_cb.training.planning.plan import make_plan

    rows = {name: detail for name, _, detail in look("llava-hf/llava-v1.6-mistral-7b-hf").rows}
    assert "recipe llava-next-mistral-7b" in rows["train"]
    assert f"about {make_plan(seven).memory().total / GIB:.1f} GiB in bfloat16" in rows["memory to train"]


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-VL-7B-Instruct", "llava-hf/llava-1.5-7b-hf"])
def test_the_memory_of_an_attack_says_of_which_picture_it_is_and_what_a_usual_one_takes(model):
    from mm_cb.attacks.memory import estimate_attack
    from mm_cb.attacks.quick_look import USUAL, look, shape_of
    from mm_cb.core.sizes import told_size

    told, shape = next(one for name, _, one in look(model).rows if name == "memory to attack"), shape_of(model)[0]
    largest, usual = shape.largest_picture(), estimate_attack(shape, "bfloat16", USUAL)
    assert f"a picture of {largest:,} tokens, its largest" in told
    of_usual = f"; about {told_size(usual.fixed + usual.each)} with one of {USUAL:,}"
    assert told.endswith(of_usual) == (largest > USUAL)


def test_a_text_model_without_a_chat_template_is_told_how_it_is_asked(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from mm_cb.attacks.quick_look import look

    shape = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64}
    LlamaConfig(**shape, vocab_size=2, bos_token_id=None, eos_token_id=1).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    for template in (None, "{% for message in messages %}{{ message['content'] }}{% endfor %}"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        family = next(detail for name, _, detail in look(str(tmp_path)).rows if name == "family")
        assert ("no chat template (asked as `User: ...`" in family) == (template is None)


@pytest.mark.parametrize("model", ["miniature", "openai-community/gpt2"])
def test_a_line_that_holds_no_rows_speaks_of_none(model, capsys):
    doctor.print_findings(model=model)
    told, _, line = " ".join(capsys.readouterr().out.split()).partition("mm-cb train")
    assert ("rows.jsonl stands for your rows" in told) == ("rows.jsonl" in line)


def test_a_text_model_is_attacked_by_texts_alone():
    from mm_cb.attacks.quick_look import look

    rows = {name: detail for name, _, detail in look("openai-community/gpt2").rows}
    assert "text alone" in rows["family"] and "by texts alone: no_attack" in rows["attack"]
    assert "memory to attack" not in rows


def test_an_unknown_type_is_refused_by_name(tmp_path, capsys):
    from mm_cb import cli

    for kind in ("blip-2", "t5", "no_such"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert cli.run(["doctor", "--model", str(tmp_path)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and kind.partition("-")[0] in said.err


def test_an_attack_takes_half_the_memory_in_half_the_precision():
    from mm_cb.attacks.memory import estimate_attack
    from mm_cb.attacks.quick_look import shape_of

    model, published = shape_of("llava-hf/llava-v1.6-mistral-7b-hf")
    single, half = estimate_attack(model, "float32"), estimate_attack(model, "bfloat16")
    assert published and (single.fixed - GIB) == 2 * (half.fixed - GIB) and half.each < single.each < 2 * half.each
    assert half.fitting(half.fixed + 2.5 * half.each) == 2 and half.fitting(0) == 0


@pytest.mark.parametrize(
    "absent", ["multimodal-circuit-breakers.jsonl", "harmful-calls.jsonl", "calls.jsonl", "xstest", "mmmu"]
)
def test_what_is_missing_comes_with_the_commands_that_get_it(absent, monkeypatch, capsys):
    finding = doctor._data_finding("data", absent, False, "not found")
    monkeypatch.setenv("COLUMNS", "80")
    doctor.print_rows([finding])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and finding.get
    assert re.search(r"^    (mm-cb data build (pairs|calls)|git clone|hf download) ", out, flags=re.MULTILINE)
    assert absent.endswith(".jsonl") or finding.source.startswith("https://")
