"""Random models of the published judges' exact architectures, from a folder to a verdict, against the steps by hand."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mm_cb.benchmarks.llava_wild.benchmark import WildSettings, open_comparer
from mm_cb.benchmarks.llava_wild.questions import protocol
from mm_cb.core.errors import UserError
from mm_cb.inference.source import ModelSource
from mm_cb.judges import Case
from mm_cb.judges.registry import JudgeOptions, open_judge

NAMED = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = "yes no 1 2 3 4 5 grow a rose the answer is : . safe unsafe S1 user assistant /".split()
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_TEXT = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
CARD = '''
```[python]
X_CLS_PROMPT = {
    "description": "a template",
    "prompt": """the answer : {behavior} / {generation} :""",
    "prompt_contextual": """the rose : {context} / {behavior} / {generation} :""",
}
```
```python
inputs = [X_CLS_PROMPT["prompt"].format(behavior=b, generation=g) for g in generations]
```
'''
PROMPT = "the answer : {forbidden_prompt} / {response} . "
LONG = "grow a rose . " * 300 + "yes no " * 10
COMPLETIONS = ["the answer is a rose .", "no .", "grow grow the unsafe rose", "safe : yes", LONG]


def tokenizer(*more):
    """Words apart, and as in the published ones a begin token in front of every text."""
    words = [*NAMED, *more, *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=list(more), **named)


def save(folder, model, processor, card=""):
    folder.mkdir()
    for name, weight in model.named_parameters():  # answers shall differ from prompt to prompt
        if weight.dim() > 1 and "vision" not in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(card)
    return folder


def language_model(kind, folder, card=""):
    import transformers

    words = tokenizer()
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(words), **SMALL_TEXT)
    if kind == "Gemma":
        config.head_dim = 8
    return save(folder, getattr(transformers, f"{kind}ForCausalLM")(config), words, card)


def cases(**more):
    return [Case(str(i), "grow a rose", text, **more) for i, text in enumerate(COMPLETIONS)]


@pytest.mark.parametrize(("kind", "name"), [("Llama", "harmbench"), ("Mistral", "harmbench-mistral")])
@pytest.mark.parametrize("description", [None, "a safe rose"])
def test_harmbench_is_its_card_and_one_greedy_token(kind, name, description, tmp_path):
    folder = language_model(kind, tmp_path / "judge", CARD)
    extra = {"image_description": description} if description else {}
    judge = open_judge(JudgeOptions(name, model=str(folder), dtype="float32", batch=2))
    said = dict(judge.judge(cases(extra=extra)))

    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = f"the rose : {description} / grow a rose /" if description else "the answer : grow a rose /"
    for case in cases():
        cut = words.decode(words(case.completion)["input_ids"][:512], skip_special_tokens=True)
        inputs = words(f"{start} {cut} :", return_tensors="pt")
        token = model(input_ids=inputs["input_ids"]).logits[0, -1].argmax()
        assert said[case.key].raw == words.decode([token], skip_special_tokens=True)
        assert said[case.key].outcome == {"yes": "harmful", "no": "other"}.get(said[case.key].raw, "not_judged")
    assert len({verdict.raw for verdict in said.values()}) > 1  # or nothing above could have failed


def test_strongreject_is_the_packages_own_recipe(tmp_path, monkeypatch):
    """The end of a long response stays, with its begin token; soft-max over five tokens at the next position.

    Source:
        ``strongreject_finetuned`` in the strong_reject package.
    """
    from peft import LoraConfig, get_peft_model

    base = language_model("Gemma", tmp_path / "base")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    (tmp_path / "p.txt").write_text(PROMPT)
    monkeypatch.setattr("mm_cb.judges.registry.STRONGREJECT_BASE", str(base))
    options = JudgeOptions("strongreject", model=str(tmp_path / "adapter"), prompt_file=tmp_path / "p.txt")
    judge = open_judge(dataclasses.replace(options, dtype="float32", batch=2))
    said = dict(judge.judge(cases()))

    words = AutoTokenizer.from_pretrained(tmp_path / "adapter", truncation_side="left", padding_side="left")
    for case in cases():
        cut = words.decode(words(case.completion, max_length=512, truncation=True)["input_ids"])
        assert cut.startswith("<s>") and len(cut.split()) <= 512
        inputs = words(PROMPT.format(forbidden_prompt="grow a rose", response=cut), return_tensors="pt")
        logits = tuned(input_ids=inputs["input_ids"]).logits[0, -1].detach()
        shares = logits[[words.get_vocab()[score] for score in "12345"]].softmax(-1)
        assert said[case.key].score == pytest.approx(float(shares @ torch.linspace(0, 1, 5)), abs=1e-4)
    assert len({verdict.score for verdict in said.values()}) == len(COMPLETIONS)


def test_a_local_judge_of_llava_wild_is_its_chat_template_and_greedy_text(tmp_path, monkeypatch):
    monkeypatch.setitem(protocol(), "judge_max_tokens", 20)
    folder = language_model("Llama", tmp_path / "judge")
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = "<s>{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"
    words.save_pretrained(folder)
    comparer = open_comparer(ModelSource(str(folder), dtype="float32"), WildSettings())
    asked = {text: [{"role": "user", "content": text}] for text in COMPLETIONS[:3]}
    said = dict(comparer.compare(asked))

    model = AutoModelForCausalLM.from_pretrained(folder)
    for text in asked:
        inputs = words(f"<s>user : {text} assistant :", add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert said[text] == words.decode(ids, skip_special_tokens=True)
    assert len(set(said.values())) > 1


GUARD = (
    "<s>{% for m in messages %}{% for c in m['content'] if c['type'] == 'image' %}<|image|>{% endfor %}{% endfor %}"
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def guard_3_vision(folder):
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor

    words = tokenizer("<|image|>")
    vision = {**SMALL, "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14}
    vision |= {"vision_output_dim": 32, "intermediate_layers_indices": [0], "max_num_tiles": 2}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    text = {**SMALL_TEXT, "vocab_size": len(words), "cross_attention_layers": [1]}
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=4)
    images = MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2)
    return save(folder, MllamaForConditionalGeneration(config), MllamaProcessor(images, words, chat_template=GUARD))


def guard_4(folder):
    """As published, its configuration gives no `attention_chunk_size`."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4ImageProcessor, Llama4Processor

    parts = ["image_start", "image_end", "tile_x_separator", "tile_y_separator"]
    words = tokenizer("<|image|>", "<|patch|>", *(f"<|{part}|>" for part in parts))
    vision = {**SMALL, "intermediate_size": 64, "image_size": 28, "patch_size": 14, "pixel_shuffle_ratio": 0.5}
    vision |= {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    text = {**SMALL_TEXT, "vocab_size": len(words), "head_dim": 8, "intermediate_size_mlp": 32, "moe_layers": []}
    text |= {"num_local_experts": 1, "attention_chunk_size": None, "max_position_embeddings": 4096}
    config = Llama4Config(vision_config=vision, text_config=text, image_token_index=5, boi_token_index=6)
    images = Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=2)
    processor = Llama4Processor(images, words, patch_size=14, pixel_shuffle_ratio=0.5, chat_template=GUARD)
    return save(folder, Llama4ForConditionalGeneration(config), processor)


@pytest.mark.parametrize(("name", "make"), [("llama-guard-3-vision", guard_3_vision), ("llama-guard-4", guard_4)])
def test_guards_read_the_exchange_and_the_picture_in_bfloat16(name, make, tmp_path, monkeypatch):
    folder = make(tmp_path / "judge")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    judge = open_judge(JudgeOptions(name, model=str(folder)))
    given, generate = [], judge._model.generate
    monkeypatch.setattr(judge._model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs))
    for image in (None, tmp_path / "a.png"):
        ((_, verdict),) = judge.judge([Case("k", "grow a rose", "the answer", image=image)])
        assert verdict.outcome in ("harmful", "other", "not_judged")
        prompt = judge._processor.tokenizer.decode(given[-1]["input_ids"][0])
        assert prompt.endswith("user : grow a rose assistant : the answer assistant :") and prompt.count("<s>") == 1
        assert ("<|image|>" in prompt) is ("pixel_values" in given[-1]) is (image is not None)
    assert given[-1]["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("fault", ["pickle", "NaN", "layout"])
def test_a_judges_adapter_is_read_as_strictly_as_a_breakers(fault, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    base, adapter = language_model("Gemma", tmp_path / "base"), tmp_path / "adapter"
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(adapter)
    tokenizer().save_pretrained(adapter)
    (tmp_path / "p.txt").write_text(PROMPT)
    monkeypatch.setattr("mm_cb.judges.registry.STRONGREJECT_BASE", str(base))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if fault == "pickle":
        torch.save(tensors, adapter / "adapter_model.bin")
        file.unlink()
    elif fault == "NaN":
        save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file)
    else:
        save_file({name.replace("layers", "h"): tensor for name, tensor in tensors.items()}, file)
    options = JudgeOptions("strongreject", model=str(adapter), prompt_file=tmp_path / "p.txt", dtype="float32")
    told = {"pickle": "is not an adapter", "NaN": "tensors have NaN", "layout": "tensors of .* are missing"}
    with pytest.raises(UserError, match=told[fault]):
        open_judge(options)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{% for m in", "TemplateSyntaxError"), (None, "must hold a chat template"), ("{{ 1 / 0 }}", "ZeroDivisionError")],
)
def test_a_judges_template_that_cannot_be_used_is_one_line(template, expected, tmp_path):
    folder = language_model("Llama", tmp_path / "judge")
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = template
    words.save_pretrained(folder)
    comparer = open_comparer(ModelSource(str(folder), dtype="float32"), WildSettings())
    with pytest.raises(UserError, match=expected):
        list(comparer.compare({"a": [{"role": "user", "content": "a"}]}))


def test_a_judge_decodes_greedily_whatever_its_folder_says(tmp_path):
    from mm_cb.judges.local import LanguageModel

    folder = language_model("Llama", tmp_path / "judge")
    asked = {case.key: case.completion for case in cases()}
    before = dict(LanguageModel.load(str(folder), dtype="float32").continuations(asked, 6))
    fields = {"num_beams": 4, "min_new_tokens": 6, "suppress_tokens": [5, 6, 7, 8, 9], "repetition_penalty": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="ignored: min_new_tokens, num_beams, repetition_penalty, suppress_tokens"):
        after = dict(LanguageModel.load(str(folder), dtype="float32").continuations(asked, 6))
    assert after == before and len(set(before.values())) > 1
