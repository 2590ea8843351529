import itertools
import unicodedata
from pathlib import Path

import pytest

from mm_cb.benchmarks.rows import read_rows
from mm_cb.core.errors import UserError
from mm_cb.core.names import Ids, refuse_groups
from mm_cb.core.paths import refuse_missing_parts, refuse_unusable, safe_id
from mm_cb.core.reading import Line
from mm_cb.data.rows import open_rows
from mm_cb.metrics.results import measure


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


SAME = (("caf\u00e9", "cafe\u0301"), ("A", "a"), ("a b", "a  b"), ("a", "\u0430"), ("a", "a\u200b"))


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_that_look_the_same_are_neither_two_ids_nor_two_groups(tmp_path, one, other):
    lines = [Line("f:1", {"split": one}), Line("f:2", {"split": other})]
    with pytest.raises(UserError, match="f:2: `split` .* at f:1, .* write one of them in both"):
        refuse_groups(lines, ["split"])
    ids = Ids("row")
    ids.take(one, "f:1")
    with pytest.raises(UserError, match="f:2: every row must have its own id, .* first at f:1"):
        ids.take(other, "f:2")


def counted_together(groups: list[dict[str, str]]) -> bool:
    """Whether a row of results.json counts others than those that one of the file's groups holds."""
    items = [
        {"id": str(n), "metric": "compliance", "subject": "base", "condition": "pgd", "outcome": "other"} | group
        for n, group in enumerate(groups)
    ]
    rows = {row.split: row.n for row in measure(items, pairs=[])}
    return any(
        rows[name] != sum(group[key] == name for group in groups) and {one[key] for one in groups} != {"all"}
        for key in ("split", "category")
        for name in {group[key] for group in groups}
    )


def test_a_group_is_counted_as_the_file_says_or_refused():
    names = ("all", "trained_kinds", "trained", "x")
    some = [{"split": split, "category": category} for split, category in itertools.product(names, repeat=2)]
    seen = set()
    for groups in itertools.combinations(some, 2):
        try:
            refuse_groups([Line(f"f:{n}", group) for n, group in enumerate(groups)], ("split", "category"))
        except UserError as error:
            assert str(error).startswith(("f:0: ", "f:1: "))
            seen.add("refused")
            continue
        assert not counted_together(list(groups)), groups
        seen.add("taken")
    assert seen == {"refused", "taken"}


def test_groups_that_nobody_would_mistake_are_taken():
    for groups in (
        [{"split": "x", "category": "x"}, {"split": "y", "category": "z"}],
        [{"split": "all"}, {"split": None}, {"split": "all"}],
        [{"split": "x"}, {}],
        [{"category": "a"}, {"category": "a"}, {"category": "b"}],
    ):
        refuse_groups([Line(f"f:{n}", group) for n, group in enumerate(groups)], ("split", "category"))


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
