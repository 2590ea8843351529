"""RRTrainer and RRConfig, as someone uses them who has read the README alone."""

import io
import json
import warnings

import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

from mm_cb import RRConfig, RRTrainer
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.models import load_model
from mm_cb.models.families import load_processor, read_config
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train
from tests.models.conftest import save_text_model
from tests.tiny_llava import picture
from tests.training.test_run import Stop, adapter_bytes

LORA = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.05, layers_to_transform=[0, 1, 2, 3])
PAPERS = {"retain_scale": "absolute", "start_distance": 0, "shared_openings": "rerouted"}
SMALL = {"target_layers": [2, 4], "max_steps": 2, "batch_size": 4, "learning_rate": 5e-3, "held_out": 1}


def chat_of(question, answer, images=0):
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.fixture(scope="module")
def rows():
    """As someone brings them: chats in the miniature's words, Pillow pictures, a set."""
    examples = embedded("miniature").training_examples(0)
    asked = [e for e in examples if "request removed" not in e.source][::31]
    return [{"id": e.id, "messages": list(e.messages), "images": list(e.images), "set": e.set} for e in asked]


@pytest.fixture(scope="module")
def loaded():
    """A transformers model and its processor, as `from_pretrained` gives them."""
    folder = embedded("miniature").weights
    model = LlavaNextForConditionalGeneration.from_pretrained(folder)
    return model, load_processor(folder, read_config(folder))


def test_ten_lines(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    my_rows = rows
    # README: begin
    from datasets import Dataset
    from peft import LoraConfig

    from mm_cb import RRConfig, RRTrainer

    dataset = Dataset.from_list([{**row, "images": [png(image) for image in row["images"]]} for row in my_rows])
    trainer = RRTrainer(
        model="miniature",
        args=RRConfig(output_dir="runs/rr", target_layers=[2, 4], max_steps=2, held_out=2),
        train_dataset=dataset,
        peft_config=LoraConfig(r=16, layers_to_transform=[0, 1, 2, 3]),
    )
    trainer.train()
    trainer.save_model("runs/rr/adapter")
    # README: end
    base = LlavaNextForConditionalGeneration.from_pretrained(embedded("miniature").weights)
    adapted = PeftModel.from_pretrained(base, "runs/rr/adapter")
    assert any(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name)
    assert len((tmp_path / "runs/rr/metrics.jsonl").read_text().splitlines()) == 2


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


@pytest.fixture(scope="module")
def command(rows, tmp_path_factory):
    """What the command line makes of the same rows and settings."""
    folder = tmp_path_factory.mktemp("command")
    file = folder / "rows.jsonl"
    lines = []
    for row in rows:
        names = []
        for number, image in enumerate(row["images"]):
            names.append(f"{row['id']}-{number}.png")
            image.save(folder / names[-1])
        lines.append(json.dumps({**row, "images": names, "source": ""}))
    file.write_text("\n".join(lines))
    breaker = ["circuit_breaker.keep_length=0", "circuit_breaker.adversary.steps=0", "circuit_breaker.loss=rand_p"]
    masks = ["circuit_breaker.masks.text=user_and_assistant", "circuit_breaker.masks.multimodal=after_image"]
    lora = ["lora.r=4", "lora.lora_alpha=4"]
    training = ["training.max_steps=2", "training.batch_size=4", "training.held_out=1"]
    training += ["training.start_distance=0", "training.average_last=0", "training.learning_rate=0.005"]
    training += ["circuit_breaker.schedule_steps=null"]
    return train(load_recipe("miniature", [f"data=[{file}]", *breaker, *masks, *lora, *training]), folder / "cli")


@pytest.mark.parametrize("given", ["name", "transformers model", "ChatModel"])
def test_it_writes_what_the_command_line_writes(given, command, rows, loaded, tmp_path):
    model, processor = loaded
    model = LlavaNextForConditionalGeneration.from_pretrained(model.name_or_path)  # each gets an adapter of its own
    models = {"name": "miniature", "transformers model": model, "ChatModel": load_model("miniature")}
    trainer = RRTrainer(
        model=models[given],
        args=RRConfig(output_dir=tmp_path / "py", loss="rand_p", **SMALL | PAPERS),
        train_dataset=rows,
        processing_class=processor,
        peft_config=LORA,
    )
    torch.rand(3)  # whatever else happens meanwhile
    trainer.train()
    trainer.save_model(tmp_path / "py" / "adapter")
    assert adapter_bytes(tmp_path / "py" / "adapter") == adapter_bytes(command)
    assert (tmp_path / "py" / "metrics.jsonl").read_bytes() == (command / "metrics.jsonl").read_bytes()
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "py/adapter", command))
    assert ours["target_modules"] == theirs["target_modules"] and ours["layers_to_transform"] is None
    if given == "name":
        assert ours == theirs


def test_a_model_that_is_lent_comes_back_whole(rows, loaded, tmp_path):
    model, processor = LlavaNextForConditionalGeneration.from_pretrained(loaded[0].name_or_path), loaded[1]
    inputs = processor(text="[INST] hello [/INST]", return_tensors="pt")
    before = model(**inputs).logits
    layers, attention = len(model.model.language_model.layers), model.model.language_model.config._attn_implementation
    args = RRConfig(output_dir=tmp_path, recompute=True, **SMALL)
    trainer = RRTrainer(model, args, rows, processor, LORA)
    trainer.train()
    assert len(model.model.language_model.layers) == layers == model.config.text_config.num_hidden_layers
    assert model.model.language_model.config._attn_implementation == attention
    assert not any("forward" in vars(block) for block in model.model.language_model.layers)
    trainer.model.eval()
    assert not torch.equal(trainer.model(**inputs).logits, before)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(trainer.model(**inputs).logits, before)


@pytest.mark.parametrize("given", ["name", "model"])
def test_flash_attention_that_cannot_be_run_is_refused_before_anything_is_loaded(
    rows, loaded, tmp_path, monkeypatch, given
):
    monkeypatch.setattr("mm_cb.training.rr_trainer.load_tower", None)
    monkeypatch.setattr("mm_cb.training.rr_trainer.put_lora", None)
    model = "miniature" if given == "name" else loaded[0]
    args = RRConfig(output_dir=tmp_path, attention="flash_attention_2", device="cpu", **SMALL)
    with pytest.raises(UserError, match="needs a GPU, .* the device is `cpu`"):
        RRTrainer(model, args, rows, loaded[1], LORA)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    args = RRConfig(output_dir=tmp_path, attention="flash_attention_2", device="cuda", **SMALL)
    with pytest.raises(UserError, match="the dtype is float32"):  # a loaded model's own, or what one by name would have
        RRTrainer(model, args, rows, loaded[1], LORA)


def test_an_interrupted_training_goes_on(model_folder, examples, tmp_path):
    from transformers import TrainerCallback

    rows = [{"messages": list(e.messages), "images": list(e.images), "set": e.set} for e in examples]

    class Stopping(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Stop

    def trainer(folder, *callbacks):
        args = RRConfig(output_dir=folder, save_steps=2, loss="rand_c", **SMALL | {"max_steps": 4})
        return RRTrainer(str(model_folder), args, rows, peft_config=LORA, callbacks=callbacks)

    whole = trainer(tmp_path / "whole")
    whole.train()
    whole.save_model()
    with pytest.raises(Stop):
        trainer(tmp_path / "run", Stopping()).train()
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_dataset_of_decoded_pictures_paths_and_bytes_reads_alike(rows, tmp_path):
    from mm_cb.data.records import as_examples

    some = [row for row in rows if row["images"]][:3] + [row for row in rows if not row["images"]][:3]
    part = {"type": Value("string"), "text": Value("string")}
    turn = {"role": Value("string"), "content": List(part)}
    features = Features(
        {"id": Value("string"), "messages": List(turn), "images": List(Image()), "set": Value("string")}
    )

    def as_parts(row):
        texts = [[{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
                 for m in row["messages"]]  # fmt: skip
        turns = [{**m, "content": content} for m, content in zip(row["messages"], texts, strict=True)]
        return {**row, "messages": turns}

    some = [as_parts(row) for row in some]
    paths = []
    for row in some:
        names = [tmp_path / f"{row['id']}-{n}.png" for n in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(name)
        paths.append({**row, "images": names})
    plain = as_examples(some)
    bytes_ = [{**row, "images": [png(image)["bytes"] for image in row["images"]]} for row in some]
    for other in (Dataset.from_list(some, features=features), paths, bytes_):
        read = as_examples(other)
        assert list(read.kinds()) == list(plain.kinds()) == [(e.set, e.modality) for e in read]
        for mine, theirs in zip(read, plain, strict=True):
            assert mine.messages == theirs.messages and mine.id == theirs.id
            assert [i.tobytes() for i in mine.open_images()] == [i.tobytes() for i in theirs.open_images()]


def test_pictures_without_image_parts_stand_in_front_of_the_first_turn():
    from mm_cb.data.records import as_examples

    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]
    (example,) = as_examples([{"messages": turns, "images": [picture()], "set": "retain"}])
    assert example.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what"}]
    assert turns[0]["content"] == "what" and example.modality == "multimodal"


GOOD = {"messages": chat_of("what", "red"), "set": "retain", "images": []}


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([], ValueError, "must hold rows, it is empty"),
        ([{"message": [], "set": "retain"}], ValueError, r"`messages` is not among .*; rename `message`\?"),
        ([{"messages": []}], ValueError, r"`set` is not among \['messages'\]"),
        (
            [GOOD, {**GOOD, "set": "harmful"}],
            ValueError,
            r"rows\[1\]: `set` must be circuit_breaker or retain, got 'harmful'",
        ),
        ([{**GOOD, "messages": chat_of("what", "red", 1)}], ValueError, r"rows\[0\]: `images` must hold 1 pictures"),
        ([{**GOOD, "messages": chat_of("what", "red", 1), "images": [picture()] * 2}], ValueError, "1 pictures.*got 2"),
        ([{**GOOD, "messages": GOOD["messages"][:1]}], ValueError, r"rows\[0\]: the roles must alternate"),
        ({"train": [GOOD]}, TypeError, "must be a datasets.Dataset .*got dict"),
        (iter([GOOD]), TypeError, "not streamed"),
        (["text"], TypeError, r"must hold dictionaries, rows\[0\] is str"),
        ([GOOD, "text"], TypeError, r"must hold dictionaries, rows\[1\] is str"),
        ([GOOD | {"images": "a.png"}], ValueError, r"rows\[0\]: `images` must be a list of pictures, got 'a.png'"),
        ([GOOD | {"images": 3}], ValueError, r"rows\[0\]: `images` must be a list of pictures, got 3"),
        ([GOOD], ValueError, "must hold text examples of the circuit_breaker set"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line(rows, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as caught:
        RRTrainer("miniature", RRConfig(output_dir=tmp_path, target_layers=[4], held_out=0), rows, peft_config=LORA)
    assert "\n" not in str(caught.value)


def png_row(colour, set_name, **more):
    content = {"messages": chat_of("what", "red", 1), "images": [png(PIL.Image.new("RGB", (8, 8), colour))]}
    return {**content, "set": set_name, **more}


REPEATED = {
    "the same chat": ([GOOD, {**GOOD, "set": "circuit_breaker"}], r"rows\[1\]: the same as rows\[0\], .* retain set"),
    "the same picture": (
        [png_row("red", "retain"), png_row("blue", "retain"), png_row("red", "circuit_breaker")],
        r"rows\[2\]: the same as rows\[0\], which is of the retain set",
    ),
    "the same id": (
        [{**GOOD, "id": "a"}, {**GOOD, "id": "a", "messages": chat_of("what", "blue")}],
        r"rows\[1\]: the id `a` was used at rows\[0\]",
    ),
    "nearly the same id": ([{**GOOD, "id": "a"}, {**GOOD, "id": "A"}], r"rows\[1\]: the id `A` differs by case"),
    "lost characters": ([{**GOOD, "messages": chat_of("wh\ufffdt", "red")}], r"rows\[0\]: a text cannot be used"),
}


@pytest.mark.parametrize("columnar", [False, True])
@pytest.mark.parametrize("case", REPEATED)
def test_rows_in_memory_are_refused_as_those_of_a_file(case, columnar):
    from mm_cb.data.records import as_examples

    rows, message = REPEATED[case]
    with pytest.raises(ValueError, match=message):
        as_examples(Dataset.from_list(rows) if columnar else rows)


@pytest.mark.parametrize("columnar", [False, True])
def test_other_pictures_are_other_rows_and_a_row_that_says_the_same_is_told(columnar):
    from mm_cb.data.records import as_examples

    rows = [png_row("red", "retain"), png_row("blue", "circuit_breaker"), png_row("red", "retain")]
    with pytest.warns(UserWarning, match=r"1 rows say what an earlier row .*rows\[2\], the same as rows\[0\]"):
        assert len(as_examples(Dataset.from_list(rows) if columnar else rows)) == 3


def test_a_column_of_single_pictures_is_one_line(tmp_path):
    features = Features({"messages": Value("string"), "images": Value("string"), "set": Value("string")})
    data = Dataset.from_list([{"messages": "x", "images": "a.png", "set": "retain"}], features=features)
    with pytest.raises(ValueError, match="column `images` must hold a list"):
        RRTrainer("miniature", RRConfig(output_dir=tmp_path), data)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (LoraConfig(target_modules=["fc1"]), ValueError, r"language tower, .*\['fc1'\] are not there"),
        (LoraConfig(target_modules=["model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"]), ValueError,
         "are not there"),
        (LoraConfig(target_modules=".*fc1"), ValueError, "are not there"),
        (LoraConfig(layers_to_transform=[9]), ValueError, r"0-based blocks in 0\.\.5 of this model, got \[9\]"),
        (LoraConfig(modules_to_save=["lm_head"]), ValueError, "`peft_config.modules_to_save` must be left out"),
        (LoraConfig(use_dora=True), ValueError, "`peft_config.use_dora` must be left out"),
        (LoraConfig(target_modules=r"([a-z._0-9]+)+!"), ValueError, "`peft_config`: matching its patterns"),
        (LoraConfig(bias="all"), ValueError, "`peft_config.bias` must be 'none'"),
        ({"r": 4}, TypeError, "must be a peft.LoraConfig, got dict"),
        (None, ValueError, r"0-based blocks in 0\.\.5 of this model, got \[14, 15, 16\]"),
    ],
)  # fmt: skip
def test_a_lora_that_lies_elsewhere_is_one_line(config, kind, message, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_cb.models.patterns.SECONDS", 1)
    with pytest.raises(kind, match=message) as caught:
        RRTrainer("miniature", RRConfig(output_dir=tmp_path, **SMALL), rows, peft_config=config)
    assert "\n" not in str(caught.value)


def test_logits_of_a_model_without_head_are_refused(rows, tmp_path):
    model = load_model("miniature").base
    model.lm_head = torch.nn.Identity()
    args = RRConfig(output_dir=tmp_path, retain="kl", **SMALL)
    with pytest.raises(ValueError, match=r"`retain='kl'` compares logits, .* has no `lm_head`"):
        RRTrainer(model, args, rows)


@pytest.mark.parametrize(
    ("config", "blocks", "names"),
    [
        (LoraConfig(), [0, 1, 2, 3], 7),
        (LoraConfig(target_modules="all-linear"), [0, 1, 2, 3], 7),
        (LoraConfig(layers_to_transform=2), [2], 7),
        (LoraConfig(target_modules=["q_proj", "mlp.up_proj"]), [0, 1, 2, 3], 2),
        (LoraConfig(target_modules=r".*layers\.[13]\.self_attn.*"), [1, 3], 4),
        (LoraConfig(target_modules=["model.language_model.layers.3.mlp.up_proj"]), [3], 1),
    ],
)
def test_names_of_modules_are_those_of_the_language_tower(config, blocks, names, rows, tmp_path):
    args = RRConfig(output_dir=tmp_path, target_layers=[4])
    trainer = RRTrainer("miniature", args, rows, peft_config=config)
    assert len(trainer.paths) == len(blocks) * names
    assert {path.removeprefix("model.language_model.layers.")[0] for path in trainer.paths} == set(map(str, blocks))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(trainer.paths)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"alfa": 3}, TypeError, "unknown field of RRConfig `alfa`, did you mean `alpha`"),
        ({"lr": 3}, TypeError, "unknown field of RRConfig `lr`, did you mean `learning_rate`"),
        ({"alpha": -1}, ValueError, r"RRConfig: `alpha`: .*above 0.*-1"),
        ({"masks": {"txt": "all"}}, ValueError, "unknown key of `masks` `txt`"),
        ({"loss": "rmu", "keep_length": 1}, ValueError, "`keep_length` must be 0 with the loss `rmu`"),
        ({"gradient_accumulation_steps": 3}, ValueError, "must be a multiple"),
    ],
)
def test_settings_are_checked_when_they_are_made(fields, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as caught:
        RRConfig(output_dir=tmp_path, **fields)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="`output_dir`"):
        RRConfig()


def test_layers_that_nobody_gave_are_said_to_be_the_default(rows, tmp_path):
    with pytest.raises(ValueError, match=r"got \[14, 15, 16\] \(the default, .*`peft_config=LoraConfig\("):
        RRTrainer("miniature", RRConfig(output_dir=tmp_path, **SMALL), rows)
    with pytest.raises(ValueError, match=r"got \[16\] \(the default, .*`RRConfig\(target_layers=\.\.\.\)` in Python"):
        RRTrainer("miniature", RRConfig(output_dir=tmp_path, held_out=1), rows, peft_config=LORA)


def test_other_arguments_of_the_wrong_kind_are_one_line(rows, loaded, tmp_path):
    args = RRConfig(output_dir=tmp_path, **SMALL)
    with pytest.raises(TypeError, match="`args` must be an mm_cb.RRConfig, got dict"):
        RRTrainer("miniature", {}, rows)
    with pytest.raises(TypeError, match="`model` must be a transformers model.*got int"):
        RRTrainer(3, args, rows, peft_config=LORA)
    with pytest.raises(TypeError, match="processor of a model that sees"):
        RRTrainer("miniature", args, rows, loaded[1].tokenizer, LORA)
    adapted = RRTrainer("miniature", args, rows, peft_config=LORA).model
    with pytest.raises(ValueError, match="has an adapter already"):
        RRTrainer(adapted, args, rows, peft_config=LORA)
    with pytest.raises(ValueError, match="`dtype` is for a model given by name"):
        RRTrainer(loaded[0], RRConfig(output_dir=tmp_path, dtype="bfloat16", **SMALL), rows, loaded[1], LORA)


def test_an_adapter_saved_before_training_is_said_to_be_untrained(rows, tmp_path):
    trainer = RRTrainer("miniature", RRConfig(output_dir=tmp_path, **SMALL), rows, peft_config=LORA)
    with pytest.warns(UserWarning, match=r"is not trained: call `train\(\)` before"):
        trainer.save_model()
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_model()


def test_a_file_where_a_folder_is_to_be_is_one_line(rows, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="must be writable, got: (File exists|Not a directory)"):
            RRTrainer("miniature", RRConfig(output_dir=place, **SMALL), rows, peft_config=LORA)
        trainer = RRTrainer("miniature", RRConfig(output_dir=tmp_path, **SMALL), rows, peft_config=LORA)
        with pytest.raises(UserError, match="must be writable, got: (File exists|Not a directory)"):
            trainer.save_model(place)


def test_what_a_caller_has_set_torch_to_changes_no_byte_and_is_as_before(rows, tmp_path):
    def trained(folder):
        trainer = RRTrainer("miniature", RRConfig(output_dir=folder, **SMALL), rows, peft_config=LORA)
        start = trainer.measure_start()
        trainer.train()
        trainer.save_model()
        return start, adapter_bytes(folder)

    def set_to():
        return torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    expected = trained(tmp_path / "usual")
    for number, mode in enumerate((torch.enable_grad, torch.no_grad, torch.inference_mode)):
        if mode is torch.enable_grad:
            torch.set_default_dtype(torch.float64)
        try:
            with mode():
                before = set_to()
                assert trained(tmp_path / str(number)) == expected, before
                assert before == set_to()
        finally:
            torch.set_default_dtype(torch.float32)


def test_columns_that_nothing_reads_are_refused_as_those_of_a_file_are():
    from mm_cb.data.records import as_examples

    for given in ([{**GOOD, "weight": 2.0, "score": 1}], Dataset.from_list([{**GOOD, "weight": 2.0, "score": 1}])):
        with pytest.raises(ValueError, match=r"`score`, `weight`.*leave them out"):
            as_examples(given)


def test_a_template_that_does_not_end_answers_is_said(rows, loaded, tmp_path):
    import copy

    processor = copy.deepcopy(loaded[1])
    processor.chat_template = processor.chat_template.replace("</s>", "").replace("eos_token", "''")
    with pytest.warns(UserWarning, match="does not end an answer with `</s>`"):
        RRTrainer("miniature", RRConfig(output_dir=tmp_path, **SMALL), rows, processor, LORA)


def test_a_text_model_and_its_tokenizer(tmp_path):
    base = save_text_model(tmp_path / "mistral", "mistral")
    tokenizer = AutoTokenizer.from_pretrained(base)
    sets = {"green": "retain", "red": "circuit_breaker"}
    rows = [{"messages": chat_of("red blue", f"{colour} circle"), "set": name} for colour, name in sets.items()]
    from transformers import AutoModelForCausalLM

    trainer = RRTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        RRConfig(output_dir=tmp_path / "run", batches="text", target_layers=[2], max_steps=2, batch_size=2, held_out=0),
        Dataset.from_list(rows),
        tokenizer,
        LoraConfig(r=2),
    )
    trainer.train()
    trainer.save_model()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")


@pytest.mark.parametrize("columnar", [False, True])
def test_rows_of_which_the_model_does_not_know_half_a_text_are_said_as_those_of_a_file(columnar, tmp_path):
    strange = "compose a considerate valedictory telegram"
    told = [{"messages": chat_of("what is it ?", "a lamp."), "set": name} for name in ("retain", "circuit_breaker")]
    told[1]["messages"] = chat_of("what is it ?", strange)
    rows = Dataset.from_list(told * 4) if columnar else told * 4
    args = RRConfig(output_dir=tmp_path, max_steps=1, target_layers=[2], batches="text", batch_size=1, held_out=0)
    with pytest.warns(UserWarning, match=r"rows\[1\]: 4 of 8 rows have a text that is mostly `<unk>` to the model"):
        RRTrainer(model="miniature", args=args, train_dataset=rows, peft_config=LoraConfig(r=2))
