from pathlib import Path

import pytest

from mm_cb.benchmarks.rows import read_rows
from mm_cb.core.errors import UserError
from mm_cb.core.paths import refuse_missing_parts
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
