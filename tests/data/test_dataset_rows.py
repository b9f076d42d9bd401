"""Reading rows: the same rows from every format, and every mistake traced to its file and row."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrlhf.config.data import DatasetSection
from rayrlhf.data.dataset_rows import read_rows
from rayrlhf.data.toy import word_problems
from rayrlhf.errors import UserError
from tests.data.hub_folder import write_hub_folder

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8)


def section(path: Path | str, **fields: object) -> DatasetSection:
    return DatasetSection(path=str(path), **fields)


def message_of(section: DatasetSection) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(texts, st.booleans(), st.none() | st.integers(1, 9))
def test_jsonl_and_parquet_give_back_what_was_written(tmp_path, values, ascii_only, limit):
    rows = [{"prompt": text, "n": i, "more": {"deep": [text]}} for i, text in enumerate(values)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8", newline="\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    for path in (lines, tmp_path / "rows.parquet"):
        assert read_rows(section(path, limit=limit)).values == rows[:limit]


def test_row_numbers_are_lines_also_after_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n  \n{"prompt": "y"}\n')
    rows = read_rows(section(tmp_path / "a.jsonl"))
    assert rows.place(1) == f"{tmp_path}/a.jsonl: row 4: prompt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"}\n{"prompt": "y"\n', "a.jsonl: row 2: not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "x"}\n["y"]\n', "a.jsonl: row 2: expected a JSON object, found list"),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', "a.jsonl: row 2: not UTF-8 (invalid start byte at byte 13)"),
        (b"\n", "a.jsonl: the dataset has no rows"),
        (b"", "a.jsonl: the dataset has no rows"),
    ],
)
def test_a_broken_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert message_of(section(tmp_path / "a.jsonl")) == f"{tmp_path}/{message}"


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "train.jsonl").touch()
    assert message_of(section(tmp_path / "trian.jsonl")) == (
        f"{tmp_path}/trian.jsonl: no such file; did you mean {tmp_path}/train.jsonl?"
    )
    assert message_of(section(tmp_path / "no" / "a.parquet")) == (
        f"{tmp_path}/no/a.parquet: no such file (nor the folder {tmp_path}/no)"
    )


def test_wrong_kinds_of_file_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    assert "expected a file ending in .jsonl, .ndjson, .json, .csv, .tsv, .parquet" in message_of(section(tmp_path / "a.txt"))
    (tmp_path / "a.parquet").write_text("no parquet")
    assert f"{tmp_path}/a.parquet: not a Parquet file" in message_of(section(tmp_path / "a.parquet"))


def test_a_file_has_no_split_or_subset(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    assert "no subset and no split" in message_of(section(tmp_path / "a.jsonl", split="test"))
    assert "no subset and no split" in message_of(section(tmp_path / "a.jsonl", subset="main"))


def test_built_in_word_problems_come_by_split_seed_count_and_limit():
    rows = read_rows(section("builtin:word-problems?seed=3&count=20", split="evaluation", limit=5))
    assert rows.values == word_problems.generate(3, 5, "evaluation")
    assert rows.prompt_field == "question"
    assert len(read_rows(section("builtin:word-problems")).values) > 1000
    assert read_rows(section("builtin:word-problems", prompt_field="answer", limit=1)).prompt_field == "answer"


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("builtin:words", "train", "unknown built-in dataset; did you mean builtin:word-problems?"),
        ("builtin:word-problems", "test", "split test: expected train or evaluation"),
        (
            "builtin:word-problems?size=3",
            "train",
            "expected options seed=N and count=N and operations=N and largest=N, found size=3",
        ),
        (
            "builtin:word-problems?count=x",
            "train",
            "expected options seed=N and count=N and operations=N and largest=N, found count=x",
        ),
        ("builtin:word-problems?count=999999", "train", "count: expected at most 20000, found 999999"),
    ],
)
def test_a_wrong_built_in_is_named(path, split, message):
    assert message in message_of(section(path, split=split))


def test_folders_go_through_the_datasets_package(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "d"}\n')
    assert read_rows(section(folder, limit=2)).values == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_rows(section(folder, split="test")).values == [{"prompt": "d"}]
    assert f"{folder}: cannot load it as a file, folder or hub dataset (split nosuch)" in message_of(
        section(folder, split="nosuch")
    )


def test_an_unknown_hub_name_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "no-such-owner/no-such-set: cannot load it as a file" in message_of(section("no-such-owner/no-such-set"))


def test_a_hub_name_has_subsets_and_splits_in_shards(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    values = [{"prompt": f"p{number}", "n": number} for number in range(7)]
    write_hub_folder(tmp_path / "openai" / "sums", values, shards=3)
    rows = read_rows(section("openai/sums", subset="main"))
    assert rows.values == values
    assert rows.place(6) == "openai/sums: row 7: prompt"
    assert read_rows(section("openai/sums", subset="main", limit=5)).values == values[:5]
    for fields in ({"subset": "main", "split": "test"}, {"subset": "other"}):
        assert read_rows(section("openai/sums", **fields)).values == values[:1]
    message = message_of(section("openai/sums", subset="mian"))
    assert message.startswith("openai/sums: cannot load it as a file, folder or hub dataset (subset mian, split train): ")
    assert "'main', 'other'" in message


def test_a_saved_dataset_is_read_with_and_without_splits(tmp_path):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    values = [{"prompt": "a"}, {"prompt": "b"}]
    Dataset.from_list(values).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(values), "rest": Dataset.from_list(values[1:])}).save_to_disk(tmp_path / "more")
    assert read_rows(section(tmp_path / "one")).values == values
    assert read_rows(section(tmp_path / "more", split="rest")).values == values[1:]
    assert message_of(section(tmp_path / "one", split="test")).endswith(
        "one: a saved dataset without splits; expected no subset and no split"
    )
    assert message_of(section(tmp_path / "more", split="test")).endswith(
        "more: a saved dataset; expected split train or rest, found test"
    )
    assert message_of(section(tmp_path / "more", subset="main")).endswith("more: a saved dataset; expected no subset")
