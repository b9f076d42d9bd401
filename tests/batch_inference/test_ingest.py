"""Bad rows are named, counted and kept apart before anything is generated; good ones are numbered without gaps."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrlhf.batch_inference.ingest import ingest_dataset
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft.dataset import write_dataset
from tests.data.hub_folder import write_hub_folder

GOOD = {"prompt": "p", "completion": "c", "extra": [1, {"deep": None}]}
BAD = [
    ({"completion": "c"}, "no field prompt"),
    ({"prompt": None, "completion": "c"}, "no field prompt"),
    ({"prompt": "p"}, "no field completion"),
    ({"prompt": "p", "completion": 7}, "completion is not text"),
    ({"prompt": ["p"], "completion": "c"}, "prompt: message 1: expected {role, content}, found 'p'"),
    ({"prompt": [{"role": "user", "content": "p"}], "completion": "c"}, "prompt is a conversation, those before are text"),
    ({"prompt": "  ", "completion": "c"}, "prompt is empty"),
    ({"prompt": "p", "completion": "\n"}, "completion is empty"),
    ({"prompt": "p" * 40, "completion": "c"}, "longer than 32 tokens"),
    ([1, 2], "expected a JSON object, found list"),
]


class Characters:
    """A tokenizer of characters."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def intake(tmp_path, rows, *, share=1.0, tokenizer=None, longest=None, part=4, **settings):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = PairsSection(path=str(path), chat=False, max_rejected_share=share, **settings)
    folders = PartFolder(tmp_path / "rows"), PartFolder(tmp_path / "rejected")
    ingest_dataset(section, *folders, rows_per_part=part, tokenizer=tokenizer, longest=longest)
    return folders


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_set_aside_with_its_line_and_reason(tmp_path, bad, reason):
    rows, rejected = intake(tmp_path, [GOOD, bad, GOOD], tokenizer=Characters(), longest=32)
    (row,) = rejected.rows()
    assert (row["source"], row["reason"]) == (2, reason)
    assert row["content"]
    assert [(row["row"], row["source"]) for row in rows.rows()] == [(0, 1), (1, 3)]
    assert rows.facts()["rejected"] == {reason: 1}


def test_a_line_that_is_no_json_is_a_bad_row_and_an_empty_one_is_none(tmp_path):
    _, rejected = intake(tmp_path, [GOOD, "\n", "{broken\n", GOOD])
    assert [(row["source"], row["reason"], row["content"]) for row in rejected.rows()] == [(3, "not JSON", "{broken")]


def test_rows_keep_their_order_numbers_and_other_fields_over_parts(tmp_path):
    given = [GOOD | {"prompt": f"p{index}", "id": index} if index % 3 else {} for index in range(20)]
    rows, _ = intake(tmp_path, given, part=4)
    read = list(rows.rows())
    assert [row["row"] for row in read] == list(range(13))
    assert [row["prompt"] for row in read] == [f"p{index}" for index in range(20) if index % 3]
    assert json.loads(read[0]["columns"]) == {"extra": [1, {"deep": None}], "id": 1}


def test_too_large_a_share_stops_with_the_reasons_and_nothing_sealed(tmp_path):
    with pytest.raises(UserError, match=r"2 of 4 rows are unusable, expected at most 40.0%.*no field prompt \(2\)"):
        intake(tmp_path, [GOOD, {}, {}, GOOD], share=0.4)
    assert not PartFolder(tmp_path / "rows").sealed
    intake(tmp_path, [GOOD, GOOD, {}, GOOD], share=0.4)
    assert len(list(PartFolder(tmp_path / "rejected").rows())) == 1, "the second start begins afresh"


def test_a_dataset_without_rows_or_without_usable_ones_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no rows"):
        intake(tmp_path, [])
    with pytest.raises(UserError, match="1 of 1 rows are unusable"):
        intake(tmp_path, [{}])


def test_a_dataset_that_changed_since_is_refused(tmp_path):
    intake(tmp_path, [GOOD])
    intake_again = [GOOD, GOOD]
    with pytest.raises(UserError, match="changed since this run read it"):
        intake(tmp_path, intake_again)


def test_parquet_reads_as_json_lines_do(tmp_path):
    given = [{"prompt": f"p{index}", "completion": "c"} for index in range(3000)]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "data.parquet")
    rows = PartFolder(tmp_path / "rows")
    section = PairsSection(path=str(tmp_path / "data.parquet"))
    ingest_dataset(section, rows, PartFolder(tmp_path / "rejected"), rows_per_part=1000, tokenizer=None, longest=None)
    assert [row["prompt"] for row in rows.rows()] == [row["prompt"] for row in given]
    assert rows.indices() == [0, 1, 2]


def test_a_hub_dataset_reads_as_json_lines_do_bad_rows_included(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = [{"prompt": None if index == 3 else f"p{index}", "completion": "c", "id": index} for index in range(9)]
    folder = write_hub_folder(tmp_path / "some" / "set", given)
    section = PairsSection(path=str(folder), subset="main", chat=False, max_rejected_share=1.0)
    rows, rejected = PartFolder(tmp_path / "hub" / "rows"), PartFolder(tmp_path / "hub" / "rejected")
    ingest_dataset(section, rows, rejected, rows_per_part=4, tokenizer=None, longest=None)
    expected, expected_rejected = intake(tmp_path, given)
    assert list(rows.rows()) == list(expected.rows())
    assert [(row["source"], row["reason"]) for row in rejected.rows()] == [(4, "no field prompt")]
    assert list(rejected.rows()) == list(expected_rejected.rows())


def test_a_missing_file_is_named_and_a_limit_is_kept(tmp_path):
    folders = PartFolder(tmp_path / "rows"), PartFolder(tmp_path / "rejected")
    with pytest.raises(UserError, match="no such file"):
        ingest_dataset(PairsSection(path=str(tmp_path / "no.jsonl")), *folders, rows_per_part=4, tokenizer=None, longest=None)
    rows, _ = intake(tmp_path, [GOOD] * 9, limit=5)
    assert rows.facts()["rows"] == 5


def test_a_lone_surrogate_is_a_bad_row(tmp_path):
    _, rejected = intake(tmp_path, ['{"prompt": "p\\ud800", "completion": "c"}\n', GOOD])
    assert [(row["source"], row["reason"]) for row in rejected.rows()] == [
        (1, "prompt: a lone surrogate at character 2, half of an emoji that was cut")
    ]


def test_a_conversation_survives_to_the_dataset(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    rows, _ = intake(tmp_path, [{"prompt": messages, "completion": [{"role": "assistant", "content": "c"}]}])
    write_dataset(rows, tmp_path / "dataset.parquet")
    (row,) = pq.read_table(tmp_path / "dataset.parquet").to_pylist()
    assert row == {"prompt": messages, "completion": [{"role": "assistant", "content": "c"}], "source": 1}
