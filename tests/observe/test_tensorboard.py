"""TensorBoard events, read back with TensorBoard's own reader."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayrlhf.errors import UserError
from rayrlhf.observe.trackers import TensorBoardSink


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_every_finite_number(tmp_path: Path):
    sink = TensorBoardSink(tmp_path)
    sink.write(1, {"objective/kl": 0.5, "loss/value_avg": math.nan})
    sink.write(2, {"objective/kl": 0.25, "loss/value_avg": 2.0})
    # Flushed: readable while the run goes on.
    assert scalars(tmp_path) == {"objective/kl": [(1, 0.5), (2, 0.25)], "loss/value_avg": [(2, 2.0)]}
    sink.close()


def test_a_resumed_run_hides_what_came_after_the_checkpoint(tmp_path: Path):
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        sink.write(step, {"x": float(step)})
    sink.close()
    sink = TensorBoardSink(tmp_path, resumed_after=2)
    sink.write(3, {"x": 30.0})
    sink.close()
    assert scalars(tmp_path) == {"x": [(1, 1.0), (2, 2.0), (3, 30.0)]}


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        TensorBoardSink(tmp_path / "file")
