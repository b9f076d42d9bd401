"""Phase times on a clock that the test turns."""

import pytest

from rayrlhf.observe.phases import PhaseTimer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_seconds_shares_and_rates_follow_from_the_spans():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("before the step"):
        clock.work(50)
    with timer.step():
        with timer.phase("generate"):
            clock.work(4)
        with timer.phase("update", tokens=300):
            clock.work(2)
        with timer.phase("update"):
            clock.work(1)
        timer.add_tokens("update", 300)
        clock.work(3)
    clock.work(1000)  # after the step: counts nowhere
    assert timer.metrics(generated_tokens=200) == pytest.approx(
        {
            "time/step": 10.0,
            "time/generate": 4.0,
            "time/update": 3.0,
            "time_share/generate": 0.4,
            "time_share/update": 0.3,
            "time_share/other": 0.3,
            "speed/generate_tokens_per_second": 50.0,
            "speed/update_tokens_per_second": 200.0,
            "speed/tokens_per_second": 20.0,
        }
    )


def test_overlapping_phases_leave_other_what_none_of_them_covers():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.step():
        with timer.phase("generate"):
            clock.work(2)
            with timer.phase("score"):
                clock.work(4)
            clock.work(1)
            with timer.phase("score"):
                clock.work(1)
        clock.work(2)
    metrics = timer.metrics()
    assert metrics["time_share/generate"] == pytest.approx(0.8)
    assert metrics["time_share/score"] == pytest.approx(0.5)
    assert metrics["time_share/other"] == pytest.approx(0.2)


def test_each_step_starts_from_nothing():
    clock = Clock()
    timer = PhaseTimer(clock)
    for name in ("first", "second"):
        with timer.step(), timer.phase(name, tokens=1):
            clock.work(1)
    assert set(timer.metrics()) == {
        "time/step",
        "time/second",
        "time_share/second",
        "time_share/other",
        "speed/second_tokens_per_second",
    }


def test_a_phase_that_raises_is_timed_all_the_same():
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail() -> None:
        with timer.step(), timer.phase("broken"):
            clock.work(2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.metrics()["time/broken"] == pytest.approx(2.0)


def test_spans_are_placed_in_wall_clock_time():
    import time

    timer = PhaseTimer()
    with timer.step(), timer.phase("now"):
        pass
    (span,) = timer.spans
    assert abs(span.start - time.time()) < 5
    assert span.end >= span.start


def test_outermost_phases_of_a_step_are_told_when_they_begin_and_end():
    told = []
    timer = PhaseTimer(listener=told.append)
    with timer.phase("outside"):
        pass
    with timer.step():
        with timer.phase("generate"), timer.phase("reward"):
            pass
        with timer.phase("update"):
            pass
    assert told == ["generate", "", "update", ""]
