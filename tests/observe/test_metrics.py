"""`metrics.jsonl` under crashes, full disks and resumes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.errors import UserError
from rayrlhf.observe.metrics import NON_FINITE, MetricsSink, read_metrics

FILE = "metrics.jsonl"


def test_each_step_is_one_json_object_on_one_line(tmp_path: Path):
    sink = MetricsSink(tmp_path)
    sink.write(1, {"objective/kl": 0.5, "episode": 64})
    sink.write(2, {"objective/kl": np.float32(0.25), "tensor": torch.tensor(2.0)})
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)
    assert read_metrics(tmp_path) == [
        {"step": 1, "objective/kl": 0.5, "episode": 64},
        {"step": 2, "objective/kl": 0.25, "tensor": 2.0},
    ]
    assert '"episode": 64' in lines[0]  # an integer stays one


def test_a_folder_without_metrics_has_none(tmp_path: Path):
    assert read_metrics(tmp_path) == []


@given(value=st.floats())
def test_a_number_comes_back_bit_for_bit_or_as_null(tmp_path_factory: pytest.TempPathFactory, value: float):
    folder = tmp_path_factory.mktemp("metrics")
    sink = MetricsSink(folder)
    sink.write(1, {"x": value})
    (line,) = read_metrics(folder)
    if math.isfinite(value):
        assert line == {"step": 1, "x": value}
    else:
        assert line == {"step": 1, "x": None, NON_FINITE: 1}
    sink.close()


def test_values_that_are_not_finite_are_counted(tmp_path: Path):
    sink = MetricsSink(tmp_path)
    sink.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    sink.write(2, {"a": -math.inf})
    assert [line[NON_FINITE] for line in read_metrics(tmp_path)] == [2, 1]
    assert sink.non_finite_count == 3


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_last_line_is_not_read_and_is_cut_off_by_the_next_writer(tmp_path: Path, cut: int):
    sink = MetricsSink(tmp_path)
    sink.write(1, {"x": 1.0})
    sink.write(2, {"x": 2.0})
    sink.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    MetricsSink(tmp_path).write(3, {"x": 3.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path):
    (tmp_path / FILE).write_text('{"step": 1, "x"')
    MetricsSink(tmp_path)
    assert (tmp_path / FILE).read_bytes() == b""


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"x": 1}'])
def test_damage_before_the_last_line_is_named(tmp_path: Path, line: str):
    (tmp_path / FILE).write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_rewinding_drops_later_steps_and_goes_on(tmp_path: Path):
    sink = MetricsSink(tmp_path)
    for step in range(1, 6):
        sink.write(step, {"x": step})
    sink.rewind(3)
    sink.write(4, {"x": 40})
    assert [(line["step"], line["x"]) for line in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    sink.rewind(0)
    assert read_metrics(tmp_path) == []


def test_a_killed_writer_leaves_every_step_it_reported(tmp_path: Path):
    script = (
        "import sys, os, signal\nfrom pathlib import Path\nfrom rayrlhf.observe.metrics import MetricsSink\n"
        "sink = MetricsSink(Path(sys.argv[1]))\n"
        "for step in range(1, 8): sink.write(step, {'x': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))


def test_a_disk_that_fills_up_leaves_whole_lines_and_one_clear_error(tmp_path: Path):
    # A limit on the file's size stands for the full disk: the system takes a part of the line and refuses the rest.
    script = (
        "import sys, resource\nfrom pathlib import Path\nfrom rayrlhf.observe.metrics import MetricsSink\n"
        "from rayrlhf.errors import UserError\n"
        "sink = MetricsSink(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "sink.write(1, {'x': 1.0})\n"
        "try: sink.write(2, {'long': 1.0, 'metric names': 2.0, 'fill the disk': 3.0})\n"
        "except UserError as error: print(error)\n"
        "sink.write(3, {'x': 3.0})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"cannot write {tmp_path / FILE}: File too large", done.stderr
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory"):
        MetricsSink(tmp_path / "file")


def test_a_write_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    MetricsSink(tmp_path).write(1, {"x": 1.0})
    assert synced[-1] == (tmp_path / FILE).stat().st_size
