import itertools
import json
import unicodedata
from pathlib import Path

import pytest

from mm_cb.benchmarks.rows import read_rows
from mm_cb.core.errors import UserError
from mm_cb.core.names import Ids, refuse_alike
from mm_cb.core.paths import refuse_missing_parts, refuse_unusable, safe_id
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.rows import open_rows


def test_numbered_parts_are_all_there():
    whole = [Path("a/train-00000-of-00002.parquet"), Path("a/train-00001-of-00002.parquet"), Path("a/test.parquet")]
    refuse_missing_parts(whole)
    other = [*whole[:1], Path("b/train-00001-of-00002.parquet"), Path("a/test-00001-of-00002.parquet")]
    for files in (whole[1:], other):
        with pytest.raises(UserError, match="`a` must hold 2 parts `train-.*, it holds 1"):
            refuse_missing_parts(files)


@pytest.mark.parametrize("read", [lambda path: read_rows(str(path)), open_rows])
def test_half_a_download_is_no_data_set(read, tmp_path):
    (tmp_path / "test-00001-of-00003.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"must hold 3 parts `test-\*-of-\*\.jsonl`, .* it holds 1"):
        read(tmp_path)


TWINS = (
    "caf\u00e9",
    "cafe\u0301",
    "cafe",
    "caf\u00e9 ",
    "CAF\u00c9",
    "\ufb01n",
    "fin",
    "stra\u00dfe",
    "strasse",
    "a/b",
    "a_b",
    "a:b",
)
TWINS += ("a" * 300, "a" * 299 + "b", "..", ".", "con", "\u200ba", "a", "\u0430")


def test_ids_that_are_kept_apart_have_files_of_their_own_on_every_disk():
    """Some disks ignore case, some take letters in another form, some cut names."""
    for one, other in itertools.combinations(TWINS, 2):
        ids = Ids("row")
        ids.take(one, "f:1")
        try:
            ids.take(other, "f:2")
        except UserError:
            continue
        names = [unicodedata.normalize("NFKD", safe_id(id)).casefold() for id in (one, other)]
        assert names[0] != names[1] and max(map(len, names)) < 100


def test_letters_in_two_forms_are_two_ids_and_no_two_groups(tmp_path):
    rows = [{"id": id, "prompt": f"p {n}", "target": "t"} for n, id in enumerate(TWINS[:2])]
    for n, category in enumerate([{}, {"category": "c"}]):
        file = tmp_path / f"{n}.jsonl"
        file.write_text("".join(json.dumps(row | category) + "\n" for row in rows))
        assert [one.id for one in read_behaviors(file)] == list(TWINS[:2])
    for one, other in (("caf\u00e9", "cafe\u0301"), ("A", "a"), ("a b", "a  b")):
        with pytest.raises(UserError, match="f:2: `split` .* at f:1, .* write one of them in both"):
            refuse_alike("split", [(one, "f:1"), (other, "f:2")])
    refuse_alike("split", [("a", "f:1"), ("a", "f:2"), ("b", "f:3")])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x" * 300, "characters are too many"),
        ("x/" * 3000, "6,[0-9]+ characters"),
        ("a\0b", "null"),
        ("\ud800", "codec"),
    ],
)
def test_a_name_that_no_file_can_have_is_named(name, told, tmp_path):
    with pytest.raises(UserError, match=f"the model .*{told}") as refused:
        refuse_unusable(tmp_path / name, "model")
    assert len(str(refused.value)) < 500
    for usable in (tmp_path, tmp_path / "none", tmp_path / "a\nb", tmp_path / "\udcff"):
        refuse_unusable(usable, "model")
