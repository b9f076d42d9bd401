"""The state behind the live view."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.observe.progress import Progress, duration, sparkline


def test_the_time_left_follows_the_mean_of_the_last_steps():
    progress = Progress(total=10)
    progress.start(100.0)
    assert progress.seconds_left(105.0) is None
    progress.finish_step(1, {}, 110.0)
    assert progress.seconds_left(110.0) == pytest.approx(90.0)
    progress.finish_step(2, {}, 130.0)
    assert progress.seconds_left(135.0) == pytest.approx(8 * 15 - 5)
    progress.finish_step(10, {}, 200.0)
    assert progress.seconds_left(300.0) == 0.0


def test_a_resumed_run_estimates_from_its_own_steps():
    progress = Progress(total=100, step=90)
    progress.start(0.0)
    progress.finish_step(91, {}, 2.0)
    assert progress.seconds_left(2.0) == pytest.approx(18.0)


def test_a_line_has_the_numbers_the_largest_phases_and_the_time_left():
    progress = Progress(total=4)
    progress.start(0.0)
    metrics = {
        "objective/scores": 0.5,
        "objective/kl": 0.0123,
        "tokens/responses_len_mean": 40.4,
        "speed/tokens_per_second": 123.4,
        "time_share/update": 0.6,
        "time_share/generate": 0.3,
        "time_share/score": 0.08,
        "time_share/other": 0.02,
    }
    progress.finish_step(1, metrics, 30.0)
    assert progress.line(30.0) == (
        "step 1/4  score 0.500  KL 0.012  length 40  tok/s 123  update 60%  generate 30%  score 8%  1m30s left"
    )


def test_a_score_has_its_interval_over_prompts():
    progress = Progress(total=4)
    progress.start(0.0)
    progress.finish_step(1, {"objective/scores": 0.5, "objective/scores_error": 0.05}, 30.0)
    assert progress.line(30.0) == "step 1/4  score 0.500 ± 0.098  1m30s left"


def test_a_sparkline_rises_with_its_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5, 5], 8) == "▁▁"
    assert sparkline([0, math.nan, 1], 8) == "▁ █"
    assert sparkline([1.5e308, -1.5e308], 8) == "█▁"
    assert sparkline([0.0, 5e-324, math.nan], 8) == "▁▁ "
    assert sparkline([], 8) == ""


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50), st.integers(0, 30))
def test_a_sparkline_never_exceeds_its_width(values: list[float], width: int):
    assert len(sparkline(values, width)) == min(width, len(values))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m")])
def test_durations_read_at_a_glance(seconds: float, text: str):
    assert duration(seconds) == text
