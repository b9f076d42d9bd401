"""Slices of a dataset are its rows, whole and in order, under the numbers that one reader gives them."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrlhf.config.data import DatasetSection
from rayrlhf.data import row_slices
from rayrlhf.data.dataset_rows import open_rows
from rayrlhf.errors import UserError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_slices, "CHUNK_ROWS", 3)


def read(path, limit=None):
    """The rows of all slices, read in reverse order from pickled copies; their sizes."""
    opened = open_rows(DatasetSection(path=str(path), limit=limit))
    chunks = [list(pickle.loads(pickle.dumps(one)).chunks()) for one in reversed(opened.slices)]
    ordered = [chunk for part in reversed(chunks) for chunk in part]
    assert max(len(numbers) for numbers, _ in ordered) <= 3
    assert opened.first() == (ordered[0][0][0], ordered[0][1][0])
    return [(number, value) for numbers, values in ordered for number, value in zip(numbers, values, strict=True)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.none() | st.text("aé\u2028 ", max_size=4), min_size=1, max_size=20), st.none() | st.integers(1, 12))
def test_lines_keep_their_numbers_whatever_is_blank_between_them(tmp_path, texts, limit):
    lines = ["" if text is None else json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "rows.jsonl").write_bytes("\r\n".join(lines).encode())
    expected = [(number, {"prompt": text}) for number, text in enumerate(texts, start=1) if text is not None][:limit]
    if expected:
        assert read(tmp_path / "rows.jsonl", limit) == expected
    else:
        with pytest.raises(UserError, match="the dataset has no rows"):
            read(tmp_path / "rows.jsonl", limit)


@pytest.mark.parametrize("limit", [None, 1, 4, 7, 8, 11, 99])
@pytest.mark.parametrize("group", [1, 2, 4, 20])
def test_row_groups_of_any_size_give_the_rows_up_to_the_limit(tmp_path, group, limit):
    rows = [{"prompt": str(number)} for number in range(11)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=group)
    assert read(tmp_path / "rows.parquet", limit) == list(enumerate(rows, start=1))[:limit]


def test_a_damaged_row_group_names_its_first_row(tmp_path):
    rows = [{"prompt": f"{number} {'x' * 200}"} for number in range(8)]
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4, compression="zstd", use_dictionary=False
    )
    damaged = bytearray((tmp_path / "rows.parquet").read_bytes())
    place = pq.read_metadata(tmp_path / "rows.parquet").row_group(1).column(0).data_page_offset
    damaged[place : place + 60] = b"\xff" * 60
    (tmp_path / "rows.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"rows\.parquet: row 5: cannot be read"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("row", [r'{"prompt": "a\ud800b"}', r'{"prompt": [{"content": "\uDFFF"}]}', r'{"a\ud800": 1}'])
def test_a_lone_surrogate_names_its_row_and_a_pair_is_text(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00"}\n' + row + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: row 2: .*a lone surrogate"):
        read(path)
