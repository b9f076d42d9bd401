"""A run folder is read as a guest: whatever is missing, torn or damaged is left out and counted."""

import json
from pathlib import Path

import pytest

from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.observe.trace import TraceWriter
from rayrlhf.tools.report.run_files import MetricsTail, WorkSpan, metrics_row, read_lines, read_mapping, read_spans


def test_rows_come_once_each_while_the_file_grows(tmp_path: Path):
    tail = MetricsTail(tmp_path)
    assert tail.read() == ([], False)
    sink = MetricsSink(tmp_path)
    sink.write(1, {"a": 1.5})
    assert tail.read() == ([{"step": 1, "a": 1.5}], False)
    assert tail.read() == ([], False)
    sink.write(2, {"a": 2.5})
    assert tail.read() == ([{"step": 2, "a": 2.5}], False)


def test_a_half_written_line_is_read_once_it_is_whole(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a"')
    tail = MetricsTail(tmp_path)
    assert tail.read() == ([{"step": 1}], False)
    assert tail.torn
    with path.open("ab") as file:
        file.write(b": 3}\n")
    assert tail.read() == ([{"step": 2, "a": 3}], False)
    assert not tail.torn


def test_a_run_that_went_back_is_read_from_its_beginning(tmp_path: Path):
    sink = MetricsSink(tmp_path)
    for step in (1, 2, 3):
        sink.write(step, {})
    tail = MetricsTail(tmp_path)
    tail.read()
    sink.rewind(1)
    sink.write(2, {"again": 1})
    assert tail.read() == ([{"step": 1}, {"step": 2, "again": 1}], True)


@pytest.mark.parametrize(
    "line",
    [b"", b"nonsense", b"[]", b"{}", b'{"step": "one"}', b'{"step": true}', b"\xff\xfe", b'{"step": NaN}', b"[" * 100_000],
)
def test_what_is_no_row_is_counted_as_damaged(line: bytes, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    tail = MetricsTail(tmp_path)
    assert tail.read()[0] == [{"step": 1}, {"step": 2}]
    assert tail.damaged == 1


def test_only_finite_numbers_are_kept_of_a_row():
    assert metrics_row(b'{"step": 1, "a": null, "b": "x", "c": true, "d": Infinity, "e": [1], "f": -2}') == {"step": 1, "f": -2}


def test_spans_come_back_with_their_actor_and_damaged_events_are_counted(tmp_path: Path):
    trace = TraceWriter(tmp_path)
    trace.span("generate", "driver", 100.0, 2.0, arguments={"step": 3})
    trace.span("work", "rollout/0", 101.0, 0.5)
    trace.close()
    with (tmp_path / "trace.json").open("a") as file:
        file.write('{"ph": "X", "name": "no times"},\n{"ph": "X", "na')
    spans, damaged = read_spans(tmp_path)
    assert spans == [WorkSpan("generate", "driver", 100.0, 102.0, 3), WorkSpan("work", "rollout/0", 101.0, 101.5, None)]
    assert damaged == 2
    assert read_spans(tmp_path / "nowhere") == ([], 0)


def test_settings_are_shown_as_they_stand_where_they_are_damaged(tmp_path: Path):
    for name, text, content in (
        ("good.yaml", "a: {b: 1}", {"a": {"b": 1}}),
        ("bad.yaml", "a: [", {}),
        ("list.yaml", "- 1", {}),
        ("tag.yaml", "a: !!python/object:os.system {}", {}),
        ("bad.json", "{", {}),
    ):
        (tmp_path / name).write_text(text)
        assert read_mapping(tmp_path / name) == (text, content)
    assert read_mapping(tmp_path / "none.yaml") == ("", {})


def test_lines_of_a_journal_that_are_no_objects_are_passed_over(tmp_path: Path):
    (tmp_path / "recovery.jsonl").write_text(json.dumps({"event": "lost"}) + "\nx\n[1]\n{")
    assert read_lines(tmp_path / "recovery.jsonl") == [{"event": "lost"}]
    assert read_lines(tmp_path / "none") == []
