import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_cb.core.errors import UserError
from mm_cb.data.rows import open_rows

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=8)


@given(RECORDS, st.sampled_from([None, 1]), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig"]))
@settings(max_examples=40, deadline=None)
def test_an_array_and_lines_give_back_what_was_written(tmp_path_factory, records, indent, plain, encoding):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.json").write_text(" \n" + json.dumps(records, indent=indent, ensure_ascii=plain), encoding=encoding)
    lines = "\n\n".join(json.dumps(record, ensure_ascii=plain) for record in records)
    (folder / "a.jsonl").write_text(lines, encoding=encoding)
    for name in ("a.json", "a.jsonl"):
        rows = open_rows(folder / name)
        assert [rows[i] for i in range(len(rows))] == records


def test_a_place_is_a_file_and_the_line_where_the_row_begins(folder):
    records = [{"a": 1}, {"a": {"b": [2, "}]"]}}, {"a": 3}]
    array = folder / "a.json"
    array.write_text(json.dumps(records, indent=1))
    expected = [2, 5, 13]
    assert [array.read_text().split("\n")[line - 1].strip() for line in expected] == ["{"] * 3
    assert [open_rows(array).where(i) for i in range(3)] == [f"{array}:{line}" for line in expected]
    array.write_text(json.dumps(records))
    assert [open_rows(array).where(i) for i in range(3)] == [f"{array}:1 row {i + 1}" for i in range(3)]
    array.write_text('[{"a": 1},\n{"a": 2}, {"a": 3}]')
    assert [open_rows(array).where(i) for i in range(3)] == [f"{array}:1", f"{array}:2 row 2", f"{array}:2 row 3"]
    lines = folder / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}')
    assert [open_rows(lines).where(i) for i in range(2)] == [f"{lines}:1", f"{lines}:3"]
    table = folder / "a.csv"
    table.write_text('a,b\n1,"two\nlines"\n3,4\n')
    rows = open_rows(table)
    assert [rows[i] for i in range(2)] == [{"a": "1", "b": "two\nlines"}, {"a": "3", "b": "4"}]
    assert [rows.where(i) for i in range(2)] == [f"{table}:2", f"{table}:4"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('[{"a": 1}, {"a": ', r"a\.json:1: the JSON array does not end"),
        ('[\n{"a": 1},\n{"a": "never', r"a\.json:3: the JSON array does not end"),
        ("", "it is empty"),
        ("\ufeff", "it is empty"),
        ("  \n ", "it holds none"),
        ("[]", "it holds none"),
        ('[{"a": 1} {"b": 2}]', r"a\.json:1: .*something else"),
        ('[{"a": 1},\n, {"b": 2}]', r"a\.json:1: .*something else"),
        ('[1, {"a": 1}]', r"a\.json:1: .*something else"),
        ('[{"a": 1},\n{"b": 2},\n3]', r"a\.json:2: .*something else"),
        ('[{"a": 1},]', r"a\.json:1: .*something else"),
        ('[{"a": 1}}', r"a\.json:1: .*something else"),
        ('[{"a": 1}]\n[{"a": 2}]', r"a\.json:1: .*something else"),
        ("[1, 2]", "something else"),
    ],
)
def test_a_damaged_file_is_named(folder, content, match):
    (folder / "a.json").write_text(content)
    with pytest.raises(UserError, match=match):
        open_rows(folder / "a.json")


def test_a_missing_file_and_a_table_without_rows(folder):
    with pytest.raises(UserError, match="cannot read the data file"):
        open_rows(folder / "none.json")
    (folder / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="at least one row"):
        open_rows(folder / "a.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named(folder, encoding):
    for name in ("a.json", "a.jsonl", "a.csv"):
        (folder / name).write_text('{"a": 1}', encoding=encoding)
        with pytest.raises(UserError, match=rf"{name}:1: .*UTF-16"):
            open_rows(folder / name)


def test_a_packed_or_binary_file_is_named(folder):
    for pack, kind in ((gzip.compress, "gzip; unpack"), (bz2.compress, "bzip2; unpack"), (lzma.compress, "xz; unpack")):
        for name in ("a.jsonl", "a.jsonl.gz", "a.csv"):
            (folder / name).write_bytes(pack(b'{"a": 1}\n'))
            with pytest.raises(UserError, match=rf"{name}:1: the file must be UTF-8 text, it is {kind} it"):
                open_rows(folder / name)
    (folder / "a.parquet").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(UserError, match="it is Parquet; convert it"):
        open_rows(folder / "a.parquet")


def test_a_broken_record_is_an_error_of_its_own_row(folder):
    (folder / "a.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n{"a": 2}\n')
    rows = open_rows(folder / "a.jsonl")
    assert rows[0] == {"a": 1} and rows[3] == {"a": 2}
    for index, match in ((1, "expected a JSON object, got broken JSON"), (2, "got list")):
        with pytest.raises(ValueError, match=match):
            rows[index]


@pytest.mark.parametrize("name", ["a.csv", "deeper/b.tsv", "C.CSV"])
def test_a_table_in_a_folder_is_asked_for_by_name(name, tmp_path):
    """The library that reads folders cuts rows with a comma too many in silence."""
    table = tmp_path / "rows" / name
    table.parent.mkdir(parents=True)
    table.write_text("prompt,output\nTell me, please,sure\n")
    with pytest.raises(UserError, match=f"holds the table `{table.name}`; give that file"):
        open_rows(tmp_path / "rows")
    table.rename(table.with_name("metadata.csv"))
    with pytest.raises(UserError, match="metadata.csv:2: the header has"):
        open_rows(tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": ', "JSON parse error"),
        ("a.parquet", b"PAR1", "ArrowInvalid"),
        ("a.md", b"words", "DataFilesNotFoundError"),
    ],
)
def test_a_folder_of_an_unknown_kind_is_named_with_the_cause_in_one_line(name, content, said, tmp_path, capfd):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"must be a folder of data files .*{said}.*give the file that holds") as caught:
        open_rows(tmp_path / "rows")
    assert "\n" not in str(caught.value) and "DatasetGenerationError" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
