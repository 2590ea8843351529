"""docs/other_harnesses.md: what it says about our files and commands is so."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from jinja2 import Environment

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "other_harnesses.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands(program):
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(program)]


def test_the_merged_folder_is_the_one_that_the_harnesses_read():
    merged, text, agent = [words[words.index("--out") + 1] for words in commands("mm-cb") if words[0] == "merge"]
    assert f"pretrained={text}," in PAGE
    assert f"pretrained={merged}," in PAGE and f"vllm serve {merged}" in PAGE and f"vllm serve {agent} " in PAGE
    assert json.loads(blocks("json")[0])["model"]["rr"]["model_path"] == merged
    assert "34b" not in merged and "interleave" not in merged


def test_the_template_for_lmms_eval_keeps_the_question_and_survives_its_argument_parser():
    (arguments,) = [words[words.index("--model_args") + 1] for words in commands("python -m lmms_eval")]
    pairs = dict(part.split("=", 1) for part in arguments.split(","))  # as lmms-eval takes them apart
    assert pairs.keys() == {"pretrained", "dtype", "chat_template"}
    messages = [{"role": "user", "content": "<image>\nwhat is this?"}]
    assert Environment().from_string(pairs["chat_template"]).render(messages=messages) == (
        "[INST] <image>\nwhat is this? [/INST]"
    )


def test_a_saved_processors_template_loses_a_question_that_is_one_string():
    from transformers import AutoTokenizer

    from mm_cb.miniature import MINIATURE

    tokenizer = AutoTokenizer.from_pretrained(MINIATURE.weights)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    assert "<image>\nwhat is this?" in tokenizer.apply_chat_template(parts, tokenize=False)
    string = [{"role": "user", "content": "<image>\nwhat is this?"}]
    assert "what" not in tokenizer.apply_chat_template(string, tokenize=False)


def test_the_adapters_names_map_onto_vllms():
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    from mm_cb.models import load_model
    from mm_cb.training.placement import lora_paths

    model = load_model("miniature")
    paths = lora_paths(model, [1], ["q_proj", "down_proj"])
    names = get_peft_model_state_dict(get_peft_model(model.base, LoraConfig(target_modules=paths, r=2)))
    assert names
    for name in names:
        ours = re.fullmatch(r"base_model\.model\.(.*)\.lora_[AB]\.weight", name)[1]
        theirs = ours.replace("model.language_model.", "language_model.model.", 1)
        assert re.fullmatch(r"language_model\.model\.layers\.1\.(self_attn\.q_proj|mlp\.down_proj)", theirs)


def test_vllms_class_declares_lora_and_the_names_that_the_page_says():
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("vllm is not installed here")
    file = Path(spec.submodule_search_locations[0]) / "model_executor" / "models" / "llava_next.py"  # needs no GPU
    (declared,) = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "LlavaNextForConditionalGeneration"
    ]
    assert "SupportsLoRA" in [base.id for base in declared.bases if isinstance(base, ast.Name)]
    pairs = [
        pair
        for node in ast.walk(declared)
        if isinstance(node, ast.Dict)
        for pair in zip(node.keys, node.values, strict=True)
    ]
    named = {key.value: value.value for key, value in pairs if isinstance(value, ast.Constant)}
    assert named["model.language_model."] == "language_model.model."


def test_the_two_lines_for_lm_eval_differ_in_the_model_and_the_output_alone():
    breaker, base = commands("lm_eval")
    differing = [place for place, (one, other) in enumerate(zip(breaker, base, strict=True)) if one != other]
    assert [breaker[place - 1] for place in differing] == ["--model_args", "--output_path"]
    models = [
        dict(part.split("=", 1) for part in words[words.index("--model_args") + 1].split(","))
        for words in (breaker, base)
    ]
    (merge,) = [words for words in commands("mm-cb") if words[0] == "merge" and models[0]["pretrained"] in words]
    assert models[1]["pretrained"] == merge[merge.index("--model") + 1] and models[0]["dtype"] == models[1]["dtype"]


def test_a_merged_text_model_is_what_lm_eval_opens(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mm_cb.models import load_model
    from mm_cb.models.merging import merge
    from tests.models.conftest import save_text_model

    base = save_text_model(tmp_path / "base", "llama")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "how to brew tea"}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ours = load_model(tmp_path / "merged")
    assert asked == ours.prompt("how to brew tea", has_image=False)
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
    plain, peft = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), adapted.eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, peft(ids).logits, atol=1e-5)


def inspect_line():
    """The line for inspect, its own options and the task's arguments."""
    ((_, task, *words),) = commands("  inspect")
    options, values = words[::2], words[1::2]
    given = [value.split("=", 1) for option, value in zip(options, values, strict=True) if option == "-T"]
    return task, dict(zip(options, values, strict=True)), dict(given)


def test_base_and_breaker_are_served_and_asked_alike_by_inspect():
    task, options, given = inspect_line()
    text = " ".join(blocks("bash"))
    assert task == "inspect_evals/$task" and "for task in agentharm agentharm_benign;" in text
    assert options["--model"] == "openai-api/$model/$model" and "for model in base rr;" in text
    assert given["refusal_judge"] == given["semantic_judge"]
    services = {"base", "rr", given["refusal_judge"].split("/")[1]}
    for setting in ("BASE_URL", "API_KEY"):
        assert {name.lower() for name in re.findall(rf"\b([A-Z]+)_{setting}=", text)} == services
    servers = [words for words in commands("vllm serve") if "--served-model-name" in words]
    names, ports = ([words[words.index(o) + 1] for words in servers] for o in ("--served-model-name", "--port"))
    assert names == ["base", "rr"]
    for name, port in zip(names, ports, strict=True):
        assert f"{name.upper()}_BASE_URL=http://localhost:{port}/v1" in text
    assert servers[0][6:] == servers[1][6:] and "--enable-auto-tool-choice" in servers[0]


def test_every_option_for_inspect_is_one_that_it_has():
    found = {name: importlib.util.find_spec(name) for name in ("inspect_ai", "inspect_evals")}
    if None in found.values():
        pytest.skip("the extra `inspect` is not installed here")
    ai, evals = (Path(spec.submodule_search_locations[0]) for spec in found.values())
    task, options, given = inspect_line()
    agentharm = evals / "agentharm"
    tasks = {
        node.name: {argument.arg for argument in node.args.args}
        for node in ast.parse((agentharm / "agentharm.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for name in ("agentharm", "agentharm_benign"):
        assert given.keys() <= tasks[name]
    cli = (ai / "_cli" / "eval.py").read_text(encoding="utf-8") + (ai / "_cli" / "common.py").read_text(
        encoding="utf-8"
    )
    assert [option for option in options if f'"{option}"' not in cli] == []
    agent = (agentharm / "agents" / "default_agent.py").read_text(encoding="utf-8")
    assert 'Literal["forced_first", "auto", "none"]' in agent and "tool_choice" in given["agent_kwargs"]
    assert "for choice in auto forced_first;" in PAGE
