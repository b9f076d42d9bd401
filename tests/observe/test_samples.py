"""Sampled responses as Parquet."""

import math
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.errors import UserError
from rayrlhf.observe.samples import Sample, SampleSink, read_samples


def sample(text: str = "4", **changes: object) -> Sample:
    values = {"prompt_id": 7, "sample": 1, "prompt": "2+2?", "response": text, "score": 0.5, "length": 3}
    return Sample(**{**values, "finish_reason": "stop", "version": 2, **changes})  # type: ignore[arg-type]


def test_a_sample_comes_back_with_every_column(tmp_path: Path):
    SampleSink(tmp_path).write(12, [sample(parts={"gsm8k": 1.0, "length": -0.5}, kl=0.25)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000012.parquet"]
    assert read_samples(tmp_path) == [
        {
            "step": 12,
            "prompt_id": 7,
            "sample": 1,
            "prompt": "2+2?",
            "response": "4",
            "score": 0.5,
            "reward/gsm8k": 1.0,
            "reward/length": -0.5,
            "kl": 0.25,
            "length": 3,
            "finish_reason": "stop",
            "version": 2,
        }
    ]


def test_the_folder_opens_as_one_table_with_any_reader(tmp_path: Path):
    sink = SampleSink(tmp_path)
    sink.write(1, [sample("a", parts={"x": math.nan}), sample("b", parts={"x": 1.0})])
    sink.write(2, [])
    sink.write(3, [sample("c", parts={"x": 2.0})])
    table = ds.dataset(tmp_path, format="parquet").to_table().sort_by([("step", "ascending"), ("response", "ascending")])
    assert table["response"].to_pylist() == ["a", "b", "c"]
    assert [row["response"] for row in read_samples(tmp_path)] == ["a", "b", "c"]
    assert math.isnan(read_samples(tmp_path)[0]["reward/x"])
    assert read_samples(tmp_path)[0]["kl"] is None


def test_writing_a_step_again_replaces_it_and_rewinding_deletes_later_ones(tmp_path: Path):
    sink = SampleSink(tmp_path)
    for step in (1, 2, 3, 1_000_000):
        sink.write(step, [sample(f"old {step}")])
    sink.write(2, [sample("new 2")])
    sink.rewind(2)
    assert [row["response"] for row in read_samples(tmp_path)] == ["old 1", "new 2"]


@given(text=st.text(st.characters(codec="utf-8"), max_size=50))
def test_any_text_can_be_stored(tmp_path_factory: pytest.TempPathFactory, text: str):
    folder = tmp_path_factory.mktemp("samples")
    SampleSink(folder).write(1, [sample(text)])
    assert read_samples(folder)[0]["response"] == text


def test_a_lone_surrogate_is_replaced(tmp_path: Path):
    SampleSink(tmp_path).write(1, [sample("a\ud800b")])
    assert read_samples(tmp_path)[0]["response"] == "a?b"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*samples"):
        SampleSink(tmp_path / "file" / "samples")
