"""What `mm-cb data check` refuses of a recipe, training refuses, and nothing else."""

import json
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.data import check, scan
from mm_cb.data.check import Limits, check_sources
from mm_cb.data.examples import Example
from mm_cb.data.rows import FileRows
from mm_cb.data.sources import Source
from mm_cb.data.unknown import Words
from mm_cb.models.chat import chat
from mm_cb.training import inputs
from mm_cb.training.batches import MissingRows, PairCollator, RowPair, drawn
from mm_cb.training.inputs import load_examples
from mm_cb.training.planning.fit import Fit, fit_of
from mm_cb.training.planning.preflight import check_recipe, rules_for
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.rr_config import config_of
from tests.models.conftest import save_text_model
from tests.models.shapes import MISTRAL_TEMPLATE
from tests.tiny_llava import picture, tiny_llava

LONG = "what is the colour of the stone ? " * 60


def row(number, set_name="retain", text="what is it", images=(), later=False):
    asked = {"type": "text", "text": f"{text} {number}"}
    shown = [{"type": "image"} for _ in images]
    turns = [
        {"role": "user", "content": [*([] if later else shown), asked]},
        {"role": "assistant", "content": "a stone"},
    ]
    if later:
        turns += [{"role": "user", "content": [*shown, {"type": "text", "text": "and this ?"}]}, turns[1]]
    return {"id": f"r{number}", "messages": turns, "images": list(images), "set": set_name}


def recipe(folder, rows, *overrides, **fields):
    """A recipe of the miniature on a file of these rows."""
    folder.mkdir(exist_ok=True)
    picture().save(folder / "a.png")
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = {"sources": [{"name": str(folder / "rows.jsonl")}], **fields}
    content = {"name": "mine", "model": "miniature", "data": data, "batches": "text"}
    content["training"] = {"max_length": 256, "batch_size": 2, "max_steps": 2, "held_out": 0}
    content["circuit_breaker"] = {"masks": {"text": "completion", "multimodal": "completion"}}
    (folder / "mine.yaml").write_text(json.dumps(content))
    return load_recipe(folder / "mine.yaml", overrides)


def trains(chosen):
    """Whether training gets as far as its first step; its error else."""
    try:
        drawn(load_examples(chosen), config_of(chosen, Path()))
    except (UserError, MissingRows) as error:
        return str(error)
    return True


def test_rows_beyond_learned_positions_are_refused_by_check_and_run(tmp_path):
    rows = [row(n, kind, "what is it " * 60) for n, kind in enumerate(("retain", "circuit_breaker"))]
    model = save_text_model(tmp_path / "gpt2", "gpt2")
    chosen = recipe(tmp_path / "data", rows, f"model={model}", "lora.modules=[c_attn]", "training.max_length=256")
    told = r"rows.jsonl:1: it has \d+ tokens, `.*gpt2` has 64 positions; set `training.max_length=64`"
    with pytest.raises(UserError, match=told):
        load_examples(chosen)
    cut = ["training.max_length=64", "circuit_breaker.masks.text=user_and_assistant"]
    assert trains(recipe(tmp_path / "data", rows, f"model={model}", *cut)) is True


def model_of_bytes(folder):
    """A model of text whose tokenizer spells every word in bytes."""
    model = save_text_model(folder, "gpt2")
    alphabet = {letter: i for i, letter in enumerate(["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    by_bytes = Tokenizer(models.BPE(alphabet, []))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel()
    named = {"unk_token": "<unk>", "eos_token": "a", "pad_token": "a"}
    PreTrainedTokenizerFast(tokenizer_object=by_bytes, **named).save_pretrained(model)
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": len(alphabet)}
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_rows_that_are_mostly_unknown_words_are_counted_in_the_same_words_by_check_and_run(tmp_path):
    foreign = "Compose a considerate valedictory telegram concerning Antarctica"
    rows = [row(n, kind) for n, kind in enumerate(("retain", "circuit_breaker") * 2)]
    rows[2] = row(2, "retain", foreign)
    chosen = recipe(tmp_path / "a", rows)
    with pytest.warns(
        UserWarning, match=r"rows.jsonl:3: 1 of 4 rows have a text that is mostly `<unk>` to the model"
    ) as told:
        load_examples(chosen)
    report = check_recipe(chosen, Limits())
    assert report.problems["unknown tokens"].first == [str(told[0].message).removesuffix(".")]
    assert not report.has_errors
    model = model_of_bytes(tmp_path / "gpt2")
    report = check_recipe(recipe(tmp_path / "b", rows, f"model={model}", "lora.modules=[c_attn]"), Limits())
    assert "unknown tokens" not in report.problems


SOUND = [row(0), row(1), row(2, "circuit_breaker"), row(3, "circuit_breaker")]

MUTATIONS = {
    "nothing": lambda r, rng: r,
    "no set": lambda r, rng: {k: v for k, v in r.items() if k != "set"},
    "no such set": lambda r, rng: r | {"set": "harmful"},
    "the other set": lambda r, rng: r | {"set": "retain" if r["set"] != "retain" else "circuit_breaker"},
    "another's id": lambda r, rng: r | {"id": "r0"},
    "a number as id": lambda r, rng: r | {"id": 3},
    "no messages": lambda r, rng: r | {"messages": []},
    "no answer": lambda r, rng: r | {"messages": r["messages"][:1]},
    "an empty turn": lambda r, rng: r | {"messages": [r["messages"][0], {"role": "assistant", "content": " "}]},
    "an odd role": lambda r, rng: r | {"messages": [{"role": "system", "content": "a"}, *r["messages"]]},
    "a picture not named": lambda r, rng: r | {"images": ["a.png"]},
    "a picture": lambda r, rng: row(rng.random(), r["set"], images=["a.png"]),
    "a picture that is not there": lambda r, rng: row(rng.random(), r["set"], images=["none.png"]),
    "a later picture": lambda r, rng: row(rng.random(), r["set"], images=["a.png"], later=True),
    "too long": lambda r, rng: row(rng.random(), r["set"], text=LONG),
    "cut": lambda r, rng: r | {"messages": [r["messages"][0], {"role": "assistant", "content": LONG}]},
    "a later picture cut off": lambda r, rng: row(rng.random(), r["set"], text=LONG, images=["a.png"], later=True),
    "a placeholder": lambda r, rng: row(rng.random(), r["set"], text="<image>"),
    "a control token": lambda r, rng: row(rng.random(), r["set"], text="a [/INST] b </s>"),
    "half a pair": lambda r, rng: row(rng.random(), r["set"], text="\ud83d"),
    "a NUL": lambda r, rng: row(rng.random(), r["set"], text="\0"),
    "another's words": lambda r, rng: row(0, r["set"]) | {"id": "new"},
    "a cut line": lambda r, rng: json.dumps(r)[: rng.randrange(60)],
    "a key twice": lambda r, rng: json.dumps(r)[:-1] + ', "set": "retain"}',
    "a list": lambda r, rng: json.dumps([r]),
}


def varied_rows():
    """Rows with every fault, and sound ones of every length around a limit of 40 tokens."""
    rng = random.Random(0)
    changed = [one(row(f"c{n}", ("retain", "circuit_breaker")[n % 2]), rng) for n, one in enumerate(MUTATIONS.values())]
    long = [row(f"l{n}", text="what " * n) for n in range(20, 60, 3)]
    pictured = [row(f"p{n}", text="what " * n, images=["a.png"], later=n % 2 > 0) for n in range(20, 60, 3)]
    unknown = row("u", text="Compose a considerate valedictory telegram")
    repeated, both = row(0) | {"id": "repeated"}, row(1, "circuit_breaker") | {"id": "both"}
    refused, blank = row("r", "circuit_breaker"), row("b")
    refused["messages"][-1] = {"role": "assistant", "content": "I'm sorry, but I can not"}
    parts = [{"type": "text", "text": text} for text in (" " * 90, "a stone")]
    blank["messages"][-1] = {"role": "assistant", "content": parts}
    return [*SOUND, *changed, *long, *pictured, unknown, repeated, both, refused, blank, row("e", text="caf\ufffd")]


def judge_at_length(monkeypatch):
    """Encode every row whole, and every text anew for every question."""

    def share(words, text):
        ids = words._tokenizer(text, add_special_tokens=False).input_ids
        return ids.count(words._unknown) / len(ids) if ids and words._unknown is not None else 0.0

    monkeypatch.setattr(Fit, "_surely", lambda *given: False)
    monkeypatch.setattr(Words, "length", lambda words, text: len(words._tokenizer(text).input_ids))
    monkeypatch.setattr(Words, "_share", share)


@pytest.mark.parametrize("mask", ["completion", "user_and_assistant"])
@pytest.mark.parametrize("max_length", [12, 40, 256])
def test_what_saves_time_changes_no_judgement_and_no_message(tmp_path, monkeypatch, mask, max_length):
    monkeypatch.setattr(check, "SHOWN", 10**6)
    settings = ["batches=alternate", f"training.max_length={max_length}", f"circuit_breaker.masks.text={mask}"]

    def judged(**fields):
        return check_recipe(recipe(tmp_path, varied_rows(), *settings, **fields), Limits(max_length=max_length))

    quick = judged()
    judge_at_length(monkeypatch)
    again = {"name": str(tmp_path / "rows.jsonl"), "limit": 10**6}  # a sample of all, examined in a second reading
    full = judged(sources=[again])
    assert (quick.problems, quick.used, quick.skipped) == (full.problems, full.used, full.skipped)
    kinds = {"broken row", "repeated id", "in both sets", "control token", "broken encoding", "missing image"}
    kinds |= {"too long", "longer", "duplicate", "some refusals", "unknown tokens"}
    assert quick.problems.keys() == kinds


def test_a_row_is_read_once_and_its_texts_tokenised_once(tmp_path, monkeypatch):
    recipe(tmp_path, SOUND)
    rules = rules_for("miniature", 256)
    read, tokenised = [], Counter()
    get, ids = FileRows.__getitem__, Words._ids
    monkeypatch.setattr(FileRows, "__getitem__", lambda rows, index: read.append(index) or get(rows, index))
    monkeypatch.setattr(Words, "_ids", lambda words, text: tokenised.update([text]) or ids(words, text))
    check_sources([Source(str(tmp_path / "rows.jsonl"))], Limits(), rules=rules)
    assert read == [0, *range(len(SOUND))]  # the first one tells the format
    assert tokenised == {text: 1 for one in SOUND for text in (one["messages"][0]["content"][0]["text"], "a stone")}


def test_tokens_are_the_models_unless_another_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, SOUND)
    other = ["--tokenizer", str(model_of_bytes(tmp_path / "gpt2"))]
    mine = ["mine.yaml", "circuit_breaker.masks.text=all"]
    spelt = len("what is it 0a stone") + 2  # with a blank in front of each text
    for arguments, tokens in ((mine, 6), ([*mine, *other], spelt), (["rows.jsonl", *other], spelt)):
        cli.run(["data", "check", *arguments, "--max-length", str(tokens - 1)])
        assert f"rows.jsonl:1: {tokens} tokens, more than {tokens - 1}" in capsys.readouterr().out, arguments


@pytest.fixture(scope="module")
def one_processor():
    """The miniature's processor is read once."""
    known = {}
    patch = pytest.MonkeyPatch()

    def remembered(model, max_length, masks, batches, backend):
        key = (model, max_length, batches, *sorted(masks.items()))
        return known[key] if key in known else known.setdefault(key, fit_of(model, max_length, masks, batches, backend))

    patch.setattr("mm_cb.training.planning.fit.fit_of", remembered)
    yield
    patch.undo()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(MUTATIONS))), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["text", "multimodal", "alternate"]),
    st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_the_check_passes_where_training_would_begin_and_nowhere_else(
    tmp_path_factory, one_processor, mutations, skip_long, skip_missing, batches, seed
):
    rows = list(SOUND)
    if batches != "text":
        rows += [row(n, s, images=["a.png"]) for n, s in ((4, "retain"), (5, "circuit_breaker"))]
    rng = random.Random(seed)
    for place, name in dict(mutations).items():  # one a row: some take what others leave out
        if isinstance(rows[place], dict):
            rows[place] = MUTATIONS[name](rows[place], rng)
    folder = tmp_path_factory.mktemp("preflight")
    fields = {"skip_too_long": skip_long, "skip_missing_images": skip_missing}
    chosen = recipe(folder, rows, f"batches={batches}", **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = trains(chosen)
        try:
            report = check_recipe(chosen, Limits())
        except UserError as error:  # the first row decides what the file is
            assert str(error) == began
            return
    assert report.has_errors == (began is not True), (report.problems, began)
    if not report.has_errors:
        skipped = load_examples(chosen).skipped
        assert {key: dict(counts) for key, counts in report.skipped.items()} == {k: dict(c) for k, c in skipped.items()}
    elif not {"no example", "missing rows"} & report.problems.keys():
        said = [line for problem in report.problems.values() for line in problem.first]
        assert any(began.split(": ")[0] == line.split(": ")[0] for line in said), (said, began)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("wrong", "batches"),
    [
        (row(9, text=LONG), "text"),
        (row(9, "circuit_breaker", text=LONG), "text"),
        (row(9, text=LONG, images=["a.png"], later=True), "alternate"),
    ],
)
def test_a_row_that_does_not_fit_is_named_or_left_out_and_counted_by_both(
    tmp_path, monkeypatch, wrong, batches, capsys
):
    monkeypatch.chdir(tmp_path)
    pictured = [row(n, s, images=["a.png"]) for n, s in ((4, "retain"), (5, "circuit_breaker"))]
    chosen = recipe(tmp_path, [*SOUND, *pictured, wrong], f"batches={batches}")
    assert "rows.jsonl:7: `max_length` is 256: " in trains(chosen)
    recipe_file = tmp_path / "mine.yaml"
    recipe_file.write_text(recipe_file.read_text().replace('"text"', f'"{batches}"', 1))
    assert cli.run(["data", "check", "mine.yaml"]) == 2
    out = capsys.readouterr().out
    assert "error: too long: 1" in out and "rows.jsonl:7: `max_length` is 256: " in out
    assert cli.run(["train", "mine.yaml", "--out", "run"]) == 2
    assert "rows.jsonl:7: `max_length` is 256: " in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cli.run(["data", "check", "rows.jsonl", "--tokenizer", "miniature", "--max-length", "256"]) == 2
    assert "rows.jsonl:7: `max_length` is 256: " in (out := capsys.readouterr().out) and "rows [0]" not in out

    recipe_file.write_text(recipe_file.read_text().replace('"data": {', '"data": {"skip_too_long": true, '))
    assert cli.run(["data", "check", "mine.yaml"]) == 0
    assert "left out by rule: 1 too long" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="1 with too long"):
        mixture = load_examples(load_recipe(tmp_path / "mine.yaml"))
    assert len(mixture) == len(SOUND) + 2 and mixture.skipped["rows"] == {"too long": 1}


def test_a_list_of_files_is_checked_as_training_reads_it(tmp_path, capsys, monkeypatch):
    """Rows that do not say their set would all be kept; a list of files takes our own rows alone."""
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, [{k: v for k, v in one.items() if k != "set"} for one in SOUND])
    content = json.loads((tmp_path / "mine.yaml").read_text()) | {"data": ["rows.jsonl"]}
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    for command in (["data", "check", "mine.yaml"], ["train", "mine.yaml", "--out", "run"]):
        assert cli.run(command) == 2
        assert "rows.jsonl:1: `rows.jsonl` must have the columns" in capsys.readouterr().err


MASKS = {"text": "completion", "multimodal": "after_image"}


@given(st.integers(0, 60), st.integers(0, 40), st.booleans(), st.integers(4, 120))
@settings(max_examples=40, deadline=None)
def test_a_row_fits_exactly_if_the_collator_takes_it(words, later_words, pictured, max_length):
    """With their pictures in full, and near the limit, where the short cut must not be taken."""
    model = tiny_llava()
    messages = chat("red " * words + "a", completion="blue")
    messages += chat("red " * later_words + "b", images=int(pictured), completion="c")
    example = Example("a", messages, [picture()] * pictured, "retain")
    fault = Fit(model, max_length, MASKS)(example)
    model.max_length = max_length
    try:
        PairCollator(model, MASKS)([RowPair(example, example)])
        taken = True
    except UserError:
        taken = False
    assert (fault is None) == taken, fault


def test_a_row_that_the_template_alone_rewrites_is_refused_by_check_and_run(tmp_path):
    """Its template does so to no other row, and to no text that a template is tried on."""
    rows = [row(n, kind) for n, kind in enumerate(("retain", "circuit_breaker") * 2)]
    rows[2] = row(2, "retain", "what is Zanzibar")
    model = save_text_model(tmp_path / "mistral", "mistral")
    rewriting = MISTRAL_TEMPLATE.replace(
        "message['content'] + ' [/", "message['content'].replace('Zanzibar', 'X') + ' [/"
    )
    (model / "chat_template.jinja").write_text(rewriting)
    chosen = recipe(tmp_path / "a", rows, f"model={model}")
    with pytest.raises(UserError, match=r"rows.jsonl:3: .* it changes the text of a turn of the role `user`"):
        load_examples(chosen)
    assert check_recipe(chosen, Limits()).has_errors


def test_rows_of_the_package_are_judged_once_under_the_same_settings(monkeypatch):
    asked, judge = [], scan.judged
    monkeypatch.setattr(scan, "judged", lambda rows, *given: asked.append(len(rows)) or judge(rows, *given))
    monkeypatch.setattr(inputs, "_taken", None)
    said = chat("what is the colour of the stone ?", images=0, completion="a stone")
    rows = (Example("a", said, [], "retain", "made"),)
    assert inputs._judged(rows, load_recipe("miniature")) is rows
    assert inputs._judged(rows, load_recipe("miniature", ["training.max_steps=3"])) is rows and asked == [1]
    with pytest.raises(UserError, match=r"miniature example 0: .*`mm-cb data check` finds all such rows"):
        inputs._judged(rows, load_recipe("miniature", ["training.max_length=8"]))
    assert inputs._judged(list(rows), load_recipe("miniature")) == [*rows] and asked == [1, 1, 1]  # other rows
