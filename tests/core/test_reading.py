import csv
import io
import json
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from mm_cb.core.checked import read_json
from mm_cb.core.errors import UserError
from mm_cb.core.folders import what_is
from mm_cb.core.reading import (
    TextFault,
    json_file,
    json_lines,
    load_yaml,
    loads,
    lost_picture,
    read_text,
    refuse_typos,
    shown,
    unfit,
)
from mm_cb.core.tables import read_table
from mm_cb.judges.prompts import read_card
from mm_cb.models.adapters import read_settings
from mm_cb.models.cache import model_folder
from mm_cb.models.decoding import generation_config
from mm_cb.models.probe import load_probe

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
BOM = b"\xef\xbb\xbf"


def write(folder, content, name="a.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_honest_json_is_read_as_python_reads_it(value, plain, indent):
    text = json.dumps(value, ensure_ascii=plain, indent=indent)
    assert loads(text) == json.loads(text)


@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=5), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_lines_are_read_with_any_mark_and_line_end(tmp_path_factory, records, bom, carriage):
    """U+2028, U+0085 and form feeds inside a text end no line."""
    end = b"\r\n" if carriage else b"\n"
    content = end.join(json.dumps(r, ensure_ascii=False).encode() for r in [*records, {"a": "x\u2028y\u0085z\u2029"}])
    path = write(tmp_path_factory.mktemp("lines"), (BOM if bom else b"") + content)
    assert [line.values for line in json_lines(path, "rows")][:-1] == records
    assert [line.where for line in json_lines(path, "rows")] == [f"{path}:{n + 1}" for n in range(len(records) + 1)]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key `a` twice"),
        ('{"b": {"a": 1, "a": 2}}', "the key `a` twice"),
        ('{"a": NaN}', "NaN, which is no number"),
        ('{"a": -Infinity}', "Infinity, which is no number"),
        ('{"a": 1e999}', "1e999, which is no number"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
        ('{"a": ' + "[" * 100000, "nested too deep"),
        ('{"a": "\\ud83d"}', r"half of a surrogate pair \(\\ud83d\)"),
        ('{"a": "\\ud83d\\ud83d\\ude00"}', "half of a surrogate pair"),
        ('{"\\ude00": 1}', "half of a surrogate pair"),
        ('{"a": "\\u0000"}', "NUL"),
        ('{"a": "\0"}', "control character"),
        ('\ufeff{"a": 1}', r"a byte order mark \(BOM\) that begins no file"),
        ('{"a": 1} {"b": 2}', "Extra data"),
        ('{"a": 1,}', "broken JSON"),
        ("{'a': 1}", "broken JSON"),
        ("null", "got NoneType"),
        ('"text"', "got str"),
    ],
)
def test_a_line_that_is_not_what_it_seems_is_named(tmp_path, line, match):
    path = write(tmp_path, '{"fine": "\\ud83d\\ude00 \\\\ud83d"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=match) as error:
        list(json_lines(path, "rows"))
    assert str(error.value).startswith(f"{path}:3: ") and len(str(error.value)) < len(str(path)) + 200


def test_answers_may_hold_a_nul(tmp_path):
    path = write(tmp_path, '{"a": "\\u0000"}')
    assert [line.values for line in json_lines(path, "rows", nul=True)] == [{"a": "\0"}]


@pytest.mark.parametrize("fault", ['"k": 1, "k": 2', '"k": NaN', '"k": "\\udc00"'])
def test_a_file_of_one_value_names_the_record_that_is_wrong(tmp_path, fault):
    path = write(tmp_path, '[\n{"fine": [1]},\n{' + fault + "},\n{}\n]", "a.json")
    with pytest.raises(UserError, match=r"a\.json:3: "):
        json_file(path, list, "a list")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"caf\xe9", r"a\.txt:1: .*byte 4 of the line \(0xe9\)"),
        (BOM + b"one\ntwo \xff", r"a\.txt:2: .*byte 5 of the line \(0xff\)"),
        ("text".encode("utf-16"), r"a\.txt:1: .*UTF-16"),
        ("text".encode("utf-16-le"), r"a\.txt:1: .*UTF-16"),
        ("text".encode("utf-16-be"), r"a\.txt:1: .*UTF-16"),
        ("text".encode("utf-32"), r"a\.txt:1: .*UTF-16"),
        (b"\xed\xa0\xbd", r"a\.txt:1: .*byte 1"),  # half of a surrogate pair, encoded
        (b"one\ntwo\0", r"a\.txt:2: .*a NUL, .* byte 4 of the line"),
    ],
)
def test_another_encoding_is_named_with_line_and_byte(tmp_path, content, match):
    with pytest.raises(UserError, match=match):
        read_text(write(tmp_path, content))


def test_what_is_no_file_is_one_line(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot read the template"):
            read_text(path, "template")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_named_and_not_read(kind, tmp_path):
    path = tmp_path / "pipe" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match=f"the template `{path}` must be a file, .* it is a {kind}"):
        read_text(path, "template")


def stand_in(path, kind):
    """Something at a path that is no file."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as held:
            held.bind(path.name)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else "nowhere")


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device", "a link that leads nowhere"])
def test_what_stands_in_place_of_a_file_is_named_and_not_passed_over(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PretrainedConfig()
    readers = {
        **dict.fromkeys(
            ("generation_config.json", "chat_template.jinja", "added_tokens.json", "vocab.txt"), model_folder
        ),
        **dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), model_folder),
        **dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), read_settings),
        "probe.json": lambda folder: load_probe(folder, None, None),
        "results.json": lambda folder: read_json(folder / "results.json"),
    }
    for name, read in readers.items():
        stand_in(tmp_path / name, kind)
        with pytest.raises(UserError, match=rf"{re.escape(name)}` must be a file, .*it is {kind}"):
            read(tmp_path)
        if name == "generation_config.json":
            (tmp_path / "config.json").write_text("{}")
            with pytest.raises(UserError, match=rf"{re.escape(name)}` must be a file, .*it is {kind}"):
                generation_config(tmp_path, config)
            (tmp_path / "config.json").unlink()
        (tmp_path / name).rmdir() if kind == "a folder" else (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device", "a link that leads nowhere"])
def test_nobody_waits_for_a_pipe_among_what_tells_a_folder(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run.json", "config.json", "adapter_config.json", "README.md"):
        stand_in(tmp_path / name, kind)
    assert what_is(tmp_path) is None
    with pytest.raises(UserError):
        read_card(str(tmp_path))


FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@given(st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=6), st.sampled_from([".csv", ".tsv"]))
@settings(max_examples=60, deadline=None)
def test_an_honest_table_is_read_as_it_was_written(tmp_path_factory, rows, ending):
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if ending == ".tsv" else ",", quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b", "c"), *rows])
    table = read_table(write(tmp_path_factory.mktemp("table"), out.getvalue(), "a" + ending))
    assert [tuple(row.values.values()) for row in table.rows] == rows and table.columns == ["a", "b", "c"]


def test_a_header_is_trimmed_and_known_without_case(tmp_path):
    table = read_table(write(tmp_path, BOM + b" ID ,Prompt,other\n1,x,y\n", "a.csv"), ("id", "prompt"))
    assert table.columns == ["id", "prompt", "other"] and table.rows[0].values == {
        "id": "1",
        "prompt": "x",
        "other": "y",
    }


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a,b\n1,2\n3,How, now\n", ":3: the header has 2 columns, the row 3"),
        ("a,b\n1,2\n3\n", ":3: the header has 2 columns, the row 1"),
        ('a,b\n1,"two\nlines"\n3,4,5\n', ":4: "),
        ('a,b\n1,2\n3,"four\n5,6\n', ":3: a double quote is never closed"),
        ('a,b\n1,2\n3,"four" five\n', ":3: a double quote is closed in the middle"),
        ('a,b\n1,"x\n3,"y\n', ":2: a double quote"),
        ("a,a\n1,2\n", ":1: .*`a` comes twice"),
        ("a,A\n1,2\n", ":1: .*`a` comes twice"),
        ("a,\n1,2\n", ":1: .*column 2 has none"),
        ("a;b\n1;2\n", ":1: .*semicolons"),
        ("a\tb\n1\t2\n", ":1: .*tabs"),
        ("a,b\n1,\0\n", ":2: a NUL"),
        ("a,b\n", "at least one row"),
        ("\n\n", "at least one row"),
    ],
)
def test_a_table_that_is_not_what_it_seems_is_named(tmp_path, content, match):
    with pytest.raises(UserError, match=match):
        read_table(write(tmp_path, content, "a.csv"), ("a",))


STRAY = [
    'id,prompt,label\n1,how,safe\n2,"why,unsafe\n3,who",safe\n4,what,unsafe\n',
    'id,prompt\n1,how\n2,"why\n3,who"\n4,what\n',
    'prompt,label\nhow,safe\n"why,unsafe\nwho,safe\nwhere",unsafe\nwhat,unsafe\n',
]


@pytest.mark.parametrize("content", STRAY)
def test_a_stray_quote_that_joins_rows_is_named(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.csv:3: a double quote joins \d lines that look like rows"):
        read_table(write(tmp_path, content, "a.csv"))


@pytest.mark.parametrize(
    ("prompt", "warned"),
    [
        ("Dear John,\nhow are you?", True),
        ("first line\nsecond line\nthird, with more, commas", False),
        ("one\n\ntwo", False),
        ('he said "a"\nand, b', False),
        ("dear John, how\nare you, and yours", False),
    ],
)
def test_an_honest_text_of_several_lines_is_one_field(tmp_path, recwarn, prompt, warned):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["prompt", "label"], ["how", "safe"], [prompt, "safe"], ["what", "unsafe"]])
    assert read_table(write(tmp_path, out.getvalue(), "a.csv")).rows[1].values["prompt"] == prompt
    assert bool(recwarn.list) == warned


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "a:\n  b: 1\n  b: 2\n", "[{a: 1, a: 2}]"])
def test_a_yaml_key_that_comes_twice_is_named_with_its_line(text):
    with pytest.raises(UserError, match=r"^r:\d: the key `[ab]` comes twice"):
        load_yaml(text, "r")


@pytest.mark.parametrize(
    ("text", "meant"), [("010", 8), ("0x10", 16), ("1_0", 10), ("1:30", 90), ("0b11", 3), ("-017", -15)]
)
def test_a_yaml_number_that_is_another_one_than_it_looks_is_named(text, meant):
    with pytest.raises(UserError, match=rf"^r:2: a whole number must be .* got `{text}` \(YAML reads it as {meant}\)"):
        load_yaml(f"a: 10\nb: {text}\n", "r")
    assert load_yaml(f"a: '{text}'\nb: 0\nc: -12\nd: +7\ne: 1e-4", "r")["a"] == text


TAGGED = ("a: !!int ''", "a: !!int '+'", "a: !!float ''", "a: !!bool x", "a: !!timestamp x", "a: !!int [1]")
"""Values that are not what their tag says."""


def test_yaml_is_read_and_merged_as_ever():
    text = "base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\nlist: [1, {c: 2}]"
    assert load_yaml(text, "r") == {"base": {"a": 1, "b": 2}, "mine": {"a": 1, "b": 3}, "list": [1, {"c": 2}]}
    for text in ("a: [", "? [1]\n: 2", "a: !!python/object x", "[" * 3000, "a: 2000-99-99", "\x01", *TAGGED):
        with pytest.raises(UserError, match="r.* is not YAML"):
            load_yaml(text, "r")


def test_a_misspelt_key_is_named_and_others_are_left_alone():
    refuse_typos({"id": 1, "semantic_category": 2, "source_id": 3, "asked": 4}, ("image", "category", "split"), "w")
    refuse_typos({"image": 1, "images": 2}, ("image",), "w")
    for key, meant in (("images", "image"), ("Category", "category"), (" split", "split"), ("imgae", "image")):
        with pytest.raises(UserError, match=f"w: unknown key `{key}`, did you mean `{meant}`"):
            refuse_typos({key: 1}, ("image", "category", "split"), "w")


@pytest.mark.parametrize(
    "key",
    "img imgs picture Pictures photo pic images_path image_path imagePath image-file image_url imgs_paths image1 "
    "input_image path_to_image image_b64 iamge image_bytes screenshot Images".split(),
)
def test_a_key_that_names_a_picture_is_not_passed_over(key):
    assert lost_picture({"prompt": "p", key: "a.png"}, ("image", "images")) == key
    assert lost_picture({"prompt": "p", key: None}, ("image", "images")) is None
    assert lost_picture({"image": "b.png", key: "a.png"}, ("image", "images")) is None
    with pytest.raises(UserError, match=f"f:1: unknown key `{key}`"):
        refuse_typos({"prompt": "p", "image": None, key: "a.png"}, ("image", "category"), "f:1")


@pytest.mark.parametrize(
    "key",
    "image_id image_size image_width image_caption image_license picture_of_the_week usage stage page pages message "
    "imagination photographer source file path url name imageid category".split(),
)
def test_what_else_is_said_of_pictures_is_left_alone(key):
    assert lost_picture({"prompt": "p", key: "a"}, ("image", "images")) is None


def test_bytes_are_shown_by_their_number():
    assert shown([b"\x89PNG" * 100]) == "[<400 bytes>]" and len(shown("x" * 1000)) < 100
    assert unfit("fine \U0001f600") is None and unfit("\0") and "surrogate" in str(unfit("a\ud83d"))


def test_a_fault_carries_its_line():
    with pytest.raises(TextFault) as error:
        loads('{\n"a": 1,\n"b" 2}')
    assert error.value.line == 3


@pytest.mark.parametrize("text", ['a: "\\ud83d"', 'a: "\\0"', '"\\udc00": 1', 'a: [b, "x\\ud83dy"]'])
def test_yaml_holds_no_half_characters_and_no_nul(text):
    with pytest.raises(UserError, match=r"r.yaml:1: a text cannot be used"):
        load_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    ("value", "kind"),
    [("!!binary aGk=", "binary"), ("!!set {b}", "set"), ("!!omap [b: 1]", "omap"), ("2024-01-01", "timestamp")],
)
def test_yaml_holds_what_json_holds(value, kind):
    with pytest.raises(UserError, match=f"r.yaml:1 is not YAML of texts, .* holds a {kind}"):
        load_yaml(f"a: {value}", "r.yaml")


@pytest.mark.parametrize("number", ["1_0.5", "1:30.5"])
def test_a_yaml_number_with_a_point_is_the_one_that_it_looks(number):
    with pytest.raises(UserError, match=f"r.yaml:1: a number must be .* got `{number}`"):
        load_yaml(f"a: {number}", "r.yaml")
    assert load_yaml("a: 1.5e-3", "r.yaml") == {"a": 0.0015}


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [*x]",
        "a: &x {b: *x}",
        "&x {r: 8, b: *x}",
        "&x [1, {b: [*x]}]",
        "a: &x\n  b: &y\n    c: [*y, *x]",
        "&x {<<: *x}",
    ]
    + ["a: &x {? [*x] : 1}", "a: &x [&y [*x], *y]"],
)
def test_a_yaml_value_that_holds_itself_is_named_with_its_line(text):
    with pytest.raises(UserError, match=r"^r.yaml:\d: the alias `\*[xy]` stands inside what it names"):
        load_yaml(text, "r.yaml")


def test_a_yaml_value_may_stand_twice():
    assert load_yaml("a: &x {b: 1}\nc: [*x, *x]\nd: &y [2]\ne: *y", "r") == {
        "a": {"b": 1},
        "c": [{"b": 1}, {"b": 1}],
        "d": [2],
        "e": [2],
    }


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t")])
@pytest.mark.parametrize("told", ["sep=", "SEP="])
def test_excels_line_about_the_separator_is_passed_over(name, separator, told, tmp_path):
    (tmp_path / name).write_text(f"{told}{separator}\r\na{separator}b\r\n1{separator}2\r\n", newline="")
    table = read_table(tmp_path / name)
    assert table.columns == ["a", "b"] and table.rows == [(f"{tmp_path / name}:3", {"a": "1", "b": "2"})]


def test_excels_line_about_another_separator_is_a_table_to_save_again(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\na;b\n1;2\n")
    with pytest.raises(UserError, match="must be apart by commas, they seem to be by semicolons"):
        read_table(tmp_path / "t.csv")


def test_json_lines_that_end_with_carriage_returns_are_told(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"id": 1}\r{"id": 2}\r')
    with pytest.raises(UserError, match=r"r\.jsonl:1: lines must end with line feeds, some end with carriage returns"):
        list(json_lines(tmp_path / "r.jsonl", "rows"))
    (tmp_path / "r.jsonl").write_bytes(b'{"id": 1}\r\n{"id": 2}\r\n')
    assert [line.values["id"] for line in json_lines(tmp_path / "r.jsonl", "rows")] == [1, 2]
