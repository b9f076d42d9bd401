"""Errors of rows come as one report."""

import json

import pytest

from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.data.prompt_datasets import prepare_prompts
from rayrlhf.errors import ErrorList, UserError
from tests.data.supervised_files import preferences, supervised, write_rows


def report_of(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value).splitlines()


def test_a_list_raises_nothing_one_error_or_all():
    errors = ErrorList(limit=3)
    errors.raise_any()
    errors.add(UserError("a"))
    with pytest.raises(UserError, match=r"^a$"):
        errors.raise_any()
    errors.add(UserError("b"))
    assert report_of(errors.raise_any) == ["a", "b"]
    assert report_of(lambda: errors.add(UserError("c"))) == [
        "a",
        "b",
        "c",
        "These are the first 3 errors; later rows were not read.",
    ]


def test_all_wrong_rows_of_a_dataset_are_named_at_once(tmp_path, tokenizer):
    good, empty = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": " "}
    lines = report_of(lambda: supervised(tmp_path, [good, empty, good, {"prompt": "q", "completion": 3}], tokenizer))
    assert ["row 2" in lines[0], "row 4" in lines[1], len(lines)] == [True, True, 2]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    lines = report_of(lambda: preferences(tmp_path, [pair, pair | {"chosen": "b"}, pair | {"chosen": ""}], tokenizer))
    assert ["row 2" in lines[0], "row 3" in lines[1], len(lines)] == [True, True, 2]


def test_all_wrong_prompts_and_missing_columns_are_named_at_once(tmp_path, tokenizer):
    def load(rows, needs=()):
        path = write_rows(tmp_path, rows)
        section = DatasetSection(path=str(path))
        data = DataSection.model_validate({"train": {"path": str(path)}})
        return prepare_prompts(section, data, tokenizer, 64, dict(needs))

    rows = [{"prompt": "q", "answer": "1"}, {"prompt": 3}, {"prompt": ""}]
    lines = report_of(lambda: load(rows))
    assert ["row 2" in lines[0], "row 3" in lines[1], len(lines)] == [True, True, 2]
    lines = report_of(lambda: load([{"prompt": json.dumps(number)} for number in range(30)], {"answer": "gsm8k"}))
    assert len(lines) == 21
    assert all(f"row {number}: gsm8k needs column 'answer'" in line for number, line in enumerate(lines[:20], start=1))


def test_a_column_that_the_first_row_lacks_is_one_line(tmp_path, tokenizer):
    path = write_rows(tmp_path, [{"question": "q"}] * 30)
    section = DatasetSection(path=str(path))
    (line,) = report_of(lambda: prepare_prompts(section, DataSection(train=section), tokenizer, 64))
    assert "row 1: prompt: the row has no such field, only question" in line
