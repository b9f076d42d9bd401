"""Records of steps: whole or refused, small, and read back bit for bit."""

import numpy as np
import pytest

from rayrlhf.errors import UserError
from rayrlhf.observe.flight_record import StepRecord, listed, read_record, recorded_steps, rewind_records, write_record


@pytest.fixture
def record():
    floats = [np.array([1.5, float("nan")], np.float32), None, np.zeros(0, np.float32)]
    return StepRecord(
        7,
        {"drawn": [3, 1], "loss": 0.1 + 0.2},
        {
            "seed": np.array([2**62, 1, 0]),
            "stopped": np.array([True, False, True]),
            "path": ["", "a", "b"],
            "ids": [np.array([1, 2], np.int32)] * 3,
            "mask": [np.array([True, False])] * 3,
            "rewards": floats,
        },
    )


def test_a_record_is_read_back_bit_for_bit(tmp_path, record):
    write_record(tmp_path, record)
    found = read_record(tmp_path, 7)
    assert found.header == record.header
    assert list(found.columns) == list(record.columns)
    for name, column in record.columns.items():
        for one, other in zip(column, found.columns[name], strict=True):
            assert (one is None and other is None) or np.asarray(one).tobytes() == np.asarray(other).tobytes()
            assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


def test_a_record_that_is_cut_or_garbled_anywhere_is_refused_in_one_line(tmp_path, record):
    path = write_record(tmp_path, record)
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    for content in [b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", b"PAR1" * 50, *flipped]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"step-000007\.\w+\.parquet is damaged") as caught:
            read_record(tmp_path, 7)
        assert "\n" not in str(caught.value)


def test_a_record_under_the_name_of_another_step_is_refused(tmp_path, record):
    path = write_record(tmp_path, record)
    path.rename(path.with_name(path.name.replace("000007", "000008")))
    with pytest.raises(UserError, match="it is of step 7"):
        read_record(tmp_path, 8)


def test_a_step_without_a_record_is_one_line_that_lists_those_with_one(tmp_path, record):
    write_record(tmp_path, record)
    with pytest.raises(UserError, match=r"step 9 has no record in .*: recorded are 7"):
        read_record(tmp_path, 9)


def test_a_repeated_step_replaces_its_record_and_a_rewind_drops_later_ones(tmp_path, record):
    write_record(tmp_path, record)
    write_record(tmp_path, StepRecord(7, {"again": True}, record.columns))
    write_record(tmp_path, StepRecord(8, {}, record.columns))
    assert len(list(tmp_path.iterdir())) == 2
    assert read_record(tmp_path, 7).header == {"again": True}
    rewind_records(tmp_path, 7)
    assert recorded_steps(tmp_path) == [7]


def test_steps_are_listed_in_ranges():
    assert listed([]) == "none"
    assert listed([1, 2, 3, 5, 8, 9]) == "1-3, 5, 8-9"
