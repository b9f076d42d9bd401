"""The trace: the format Perfetto loads, after a clean end, a kill, and a resume."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.observe.trace import BUFFERED_EVENTS, TraceWriter


def check_format(events: list[dict]) -> None:
    """Check the Trace Event Format's rules for the kinds of events used."""
    named = {"process_name": set(), "thread_name": set()}
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            assert isinstance(event["args"]["name"], str)
            named[event["name"]].add(event["pid"] if event["name"] == "process_name" else event["tid"])
            continue
        assert isinstance(event["ts"], int)
        assert event["pid"] in named["process_name"]
        assert event["tid"] in named["thread_name"]
        assert event["ph"] == "X"
        assert event["dur"] >= 0


def read_trace(path: Path) -> list[dict]:
    """The events of a trace, with or without its closing bracket."""
    text = path.read_text().rstrip().removesuffix(",")
    return json.loads(text if text.endswith("]") else text + "]")


def spans(path: Path) -> list[str]:
    return [event["name"] for event in read_trace(path) if event["ph"] == "X"]


def test_a_closed_trace_is_valid_json_with_all_that_was_added(tmp_path: Path):
    trace = TraceWriter(tmp_path)
    trace.span("generate", "rollout-0", 1_700_000_000.5, 2.0, arguments={"samples": 64, "quote": '"\n'})
    trace.span("score", "reference-0", 1_700_000_001.0, 0.25)
    trace.span("step", "driver", 1_700_000_002.0, 1.0)
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    check_format(events)
    span = next(event for event in events if event["name"] == "generate")
    assert (span["ts"], span["dur"]) == (1_700_000_000_500_000, 2_000_000)
    assert span["args"] == {"samples": 64, "quote": '"\n'}
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {"rollout-0", "reference-0", "driver"}


def test_a_trace_without_events_is_an_empty_array(tmp_path: Path):
    TraceWriter(tmp_path).close()
    assert json.loads((tmp_path / "trace.json").read_text()) == []


def test_memory_stays_bounded_because_events_go_to_the_disk(tmp_path: Path):
    trace = TraceWriter(tmp_path)
    for number in range(10 * BUFFERED_EVENTS):
        trace.span(f"s{number}", "driver", number, 1)
        assert len(trace._pending) < BUFFERED_EVENTS
    trace.close()
    assert spans(tmp_path / "trace.json") == [f"s{n}" for n in range(10 * BUFFERED_EVENTS)]


def test_a_killed_run_leaves_a_trace_that_loads_up_to_the_last_flush(tmp_path: Path):
    script = (
        "import sys, os, signal\nfrom pathlib import Path\nfrom rayrlhf.observe.trace import TraceWriter\n"
        "trace = TraceWriter(Path(sys.argv[1]))\n"
        "for n in range(5): trace.span(f's{n}', 'driver', n, 1)\n"
        "trace.flush()\ntrace.span('lost', 'driver', 9, 1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    path = tmp_path / "trace.json"
    assert not path.read_text().rstrip().endswith("]")
    check_format(read_trace(path))
    assert spans(path) == [f"s{n}" for n in range(5)]


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("torn", [0, 3, 40])
def test_a_resumed_run_continues_the_trace_after_its_last_whole_event(tmp_path: Path, closed: bool, torn: int):
    trace = TraceWriter(tmp_path)
    trace.span("first", "driver", 1, 1)
    trace.span("second", "driver", 2, 1)
    trace.close() if closed else trace.flush()
    path = tmp_path / "trace.json"
    size = path.stat().st_size - (3 if closed else 0)
    if torn:
        with path.open("r+b") as file:
            file.truncate(size - torn)
    resumed = TraceWriter(tmp_path)
    resumed.span("third", "driver", 3, 1)
    resumed.close()
    check_format(json.loads(path.read_text()))
    assert spans(path) == (["first", "third"] if torn else ["first", "second", "third"])


@pytest.mark.parametrize("content", ["", "[", "[]\n", "[\n{", "garbage"])
def test_a_file_without_any_whole_event_starts_afresh(tmp_path: Path, content: str):
    (tmp_path / "trace.json").write_text(content)
    trace = TraceWriter(tmp_path)
    trace.span("only", "driver", 1, 1)
    trace.close()
    assert [e["name"] for e in json.loads((tmp_path / "trace.json").read_text()) if e["ph"] == "X"] == ["only"]


def test_only_the_end_of_a_long_trace_is_read_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rayrlhf.observe.trace.TAIL_BYTES", 500)
    for part in range(3):
        trace = TraceWriter(tmp_path)
        for number in range(20):
            trace.span(f"{part}-{number}", "driver", number, 1)
        trace.flush() if part == 1 else trace.close()
    assert spans(tmp_path / "trace.json") == [f"{part}-{number}" for part in range(3) for number in range(20)]


def test_an_actor_keeps_its_number_across_restarts(tmp_path: Path):
    for _ in range(2):
        trace = TraceWriter(tmp_path)
        trace.span("work", "policy-0", 1, 1)
        trace.close()
    assert len({(e["pid"], e["tid"]) for e in read_trace(tmp_path / "trace.json") if e["ph"] == "X"}) == 1
