"""The stated sample of a run's rollouts."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.observe.samples import SampleSink
from rayrlhf.tools.report.run_samples import cut, evenly_spaced, read_rollouts, sample_rollouts
from tests.tools.report.runs import sample


@given(st.integers(0, 5000), st.integers(0, 700))
def test_places_are_spread_evenly_over_the_whole(count: int, most: int):
    places = evenly_spaced(count, most)
    assert len(places) == min(count, most)
    assert places == sorted(set(places))
    if count and most > 1:
        assert (places[0], places[-1]) == (0, count - 1)


def test_the_sample_covers_the_run_and_the_total_counts_every_row(tmp_path: Path):
    chance = random.Random(0)
    for step in range(1, 41):
        SampleSink(tmp_path).write(step, [sample(step, number, chance) for number in range(10)])
    found = sample_rollouts(tmp_path, 50)
    assert found.total == 400
    assert len(found.rows) == 50
    assert {row["step"] for row in found.rows} == set(range(1, 41))


def test_a_small_run_is_there_whole_and_a_damaged_file_is_counted(tmp_path: Path):
    SampleSink(tmp_path).write(1, [sample(1, number, random.Random(0)) for number in range(3)])
    SampleSink(tmp_path).write(2, [])
    (tmp_path / "step-000003.parquet").write_bytes(b"PAR1 torn")
    found = sample_rollouts(tmp_path, 50)
    assert (len(found.rows), found.total, found.unreadable) == (3, 3, 1)
    assert read_rollouts(tmp_path / "step-000003.parquet", 5) == []
    assert sample_rollouts(tmp_path / "none", 50).total == 0


def test_texts_are_cut_and_say_so_and_numbers_that_are_none_are_empty(tmp_path: Path):
    SampleSink(tmp_path).write(1, [sample(1, 0, random.Random(0), response="x" * 1000, score=float("nan"))])
    row = sample_rollouts(tmp_path, 50).rows[0]
    assert row["response"] == "x" * 600 + " … [400 more characters]"
    assert row["score"] is None
    assert cut("short") == "short"


@pytest.mark.parametrize("most", [0, 1])
def test_a_sample_may_be_tiny(tmp_path: Path, most: int):
    SampleSink(tmp_path).write(1, [sample(1, number, random.Random(0)) for number in range(3)])
    assert len(sample_rollouts(tmp_path, most).rows) == most
