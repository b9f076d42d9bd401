import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from rayrlhf.tools.bench.paired import Comparison, compare, paired_ratio


def test_contenders_take_turns_and_change_who_goes_first():
    calls = []
    speeds = {"base": 100.0, "ours": 200.0}
    contenders = {name: lambda name=name: calls.append(name) or speeds[name] for name in speeds}
    found = compare("speed", "tokens/s", contenders, 3)
    assert calls == ["base", "ours", "ours", "base", "base", "ours"]
    assert found.speeds == {"base": [100.0] * 3, "ours": [200.0] * 3}


def test_a_drift_of_the_machine_does_not_reach_the_ratio():
    baseline = [100.0, 50.0, 80.0, 20.0, 90.0]
    ratio = paired_ratio([2.0 * speed for speed in baseline], baseline)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_covers_the_ratios_that_were_seen_and_holds_the_median():
    ratio = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert ratio.median == 3.0
    assert 1.0 <= ratio.low < 3.0 < ratio.high <= 5.0


def test_a_comparison_is_written_for_machines_and_for_people():
    found = Comparison("tiny", "tokens/s", {"base": [1000.0, 1000.0], "ours": [1900.0, 2100.0]})
    assert found.numbers()["ratios"]["ours"][0] == pytest.approx(2.0)
    assert "| ours | 2,000 | 2.00 (1.90 to 2.10) |" in found.as_markdown()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_benchmark_that_a_signal_ends_leaves_no_process(number: signal.Signals):
    seconds = 3 if number == signal.SIGKILL else 20  # a parent that is killed tells its contender nothing
    script = (
        "import time; from rayrlhf.observe.loop_control import stop_as_error\n"
        "from rayrlhf.tools.bench.paired import in_new_process\n"
        f"with stop_as_error(): in_new_process(time.sleep, {seconds})"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        children: list[psutil.Process] = []
        while len(children) < 2 and parent.poll() is None:  # the contender, and the resource tracker of spawn
            time.sleep(0.05)
            children = psutil.Process(parent.pid).children(recursive=True)
        started = time.monotonic()
        os.kill(parent.pid, number)
        assert parent.wait(60) != 0
        _, left = psutil.wait_procs(children, timeout=60)
        assert not left
        assert number == signal.SIGKILL or time.monotonic() - started < 15
    finally:
        for process in (parent, *children):
            if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
                process.kill()
