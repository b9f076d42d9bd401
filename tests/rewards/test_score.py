"""Scores from functions: the sum, the checks on what user code returns, and coroutines."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rayrlhf.errors import DeadlineError, UserError
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch
from rayrlhf.rewards.score import score_batch, weighted_sum

BATCH = ScoringBatch(prompts=["a", "b", "c"], responses=["1", "2", "3"])


def bound(function: Callable[..., Any], weight: float = 1.0) -> BoundFunction:
    return BoundFunction(function.__name__, function, weight)


def value(responses: list[str]) -> list[float]:
    return [float(r) for r in responses]


def only_the_first(responses: list[str]) -> list[float | None]:
    return [10.0, None, None]


async def judge(responses: list[str]) -> list[float]:
    await asyncio.sleep(0.01)
    return [-float(r) for r in responses]


def test_the_score_is_the_weighted_sum_of_all_parts():
    rewards = score_batch([bound(value, 2.0), bound(judge, 0.5)], BATCH)
    np.testing.assert_array_equal(rewards.scores, np.array([1.5, 3.0, 4.5], dtype=np.float32))
    assert rewards.scores.dtype == np.float32
    assert {name: part.tolist() for name, part in rewards.parts.items()} == {"value": [1, 2, 3], "judge": [-1, -2, -3]}
    assert list(rewards.parts) == ["value", "judge"]


def test_none_is_left_out_of_the_sum_and_shows_as_nan():
    rewards = score_batch([bound(value), bound(only_the_first)], BATCH)
    assert rewards.scores.tolist() == [11.0, 2.0, 3.0]
    np.testing.assert_array_equal(rewards.parts["only_the_first"], [10.0, np.nan, np.nan])


def test_a_sample_that_nothing_applies_to_is_an_error_and_never_a_zero():
    with pytest.raises(UserError, match="no reward applies to sample 1: all of only_the_first returned None"):
        score_batch([bound(only_the_first)], BATCH)


@given(st.integers(1, 4).flatmap(lambda k: arrays(np.float32, (k, 5), elements=st.floats(-100, 100, width=16))))
def test_the_weighted_sum_is_a_dot_product(values: np.ndarray):
    weights = {str(i): 0.5 + i for i in range(len(values))}
    rewards = weighted_sum({str(i): row for i, row in enumerate(values)}, weights)
    np.testing.assert_allclose(rewards.scores, (np.arange(len(values)) + 0.5) @ values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "returned", [(1, 2, 3), np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), [np.float64(1), np.int8(2), torch.tensor(3)]]
)
def test_any_list_of_numbers_is_taken(returned: Any):
    assert score_batch([BoundFunction("f", lambda: returned)], BATCH).scores.tolist() == [1.0, 2.0, 3.0]


def test_booleans_are_ones_and_zeros():
    assert score_batch([BoundFunction("f", lambda: [True, np.False_, False])], BATCH).scores.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "'f' returned 2 values, expected 3"),
        ([], "'f' returned 0 values, expected 3"),
        (1.0, "'f' returned float 1.0, expected a list of 3 numbers"),
        (None, "'f' returned NoneType None, expected a list"),
        ("abc", "'f' returned str 'abc', expected a list"),
        ({"a": 1, "b": 2, "c": 3}, "'f' returned dict"),
        ({1, 2, 3}, "'f' returned set"),
        (iter([1, 2, 3]), "expected a list of 3 numbers"),
        (torch.tensor(1.0), "expected a list of 3 numbers"),
        ([1.0, float("nan"), 2.0], "'f' returned float nan for sample 1, expected a finite number or None"),
        ([1.0, 2.0, float("inf")], "returned float inf for sample 2"),
        ([1e300, 1.0, 1.0], r"returned float 1e+300 for sample 0"),
        ([10**400, 1.0, 1.0], "for sample 0"),
        ([1.0, "2", 3.0], "returned str '2' for sample 1"),
        ([1.0, [2.0], 3.0], "returned list [2.0] for sample 1"),
        ([1.0, 2.0, 3 + 4j], "returned complex (3+4j) for sample 2"),
        (np.zeros((3, 2)), "for sample 0"),
        ([1.0, "x" * 1000, 1.0], "..."),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_one_finite_number_per_sample_is_named(returned: Any, message: str):
    with pytest.raises(UserError) as caught:
        score_batch([BoundFunction("f", lambda: returned)], BATCH)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_a_function_that_raises_is_named_with_place_and_cause():
    def broken(responses: list[str]) -> list[float]:
        raise KeyError("two\nlines")

    with pytest.raises(UserError, match=r"'broken' raised KeyError: 'two\\nlines' \(.*test_score\.py:\d+\)") as caught:
        score_batch([bound(broken)], BATCH)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_coroutine_that_raises_is_named_in_the_same_way():
    async def broken(responses: list[str]) -> list[float]:
        raise ConnectionError("refused")

    with pytest.raises(UserError, match=r"'broken' raised ConnectionError: refused \(.*test_score\.py:\d+\)") as caught:
        score_batch([bound(broken)], BATCH)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_functions_own_time_out_is_not_taken_for_ours():
    async def broken(responses: list[str]) -> list[float]:
        raise TimeoutError("the server's")

    with pytest.raises(UserError, match="'broken' raised TimeoutError: the server's"):
        score_batch([bound(broken)], BATCH)


def test_coroutines_run_at_the_same_time_as_each_other_and_as_the_rest():
    def slow(seconds: float, name: str) -> BoundFunction:
        async def wait(responses: list[str]) -> list[float]:
            await asyncio.sleep(seconds)
            return [seconds] * len(responses)

        return BoundFunction(name, wait)

    def blocking(responses: list[str]) -> list[float]:
        time.sleep(2.0)
        return [1.0] * len(responses)

    start = time.perf_counter()
    rewards = score_batch([slow(2.0, "x"), bound(blocking), slow(2.0, "y")], BATCH)
    assert time.perf_counter() - start < 3.9
    assert list(rewards.parts) == ["x", "blocking", "y"]


def test_an_overrunning_coroutine_is_named_and_cancelled():
    cancelled = threading.Event()

    async def stuck(responses: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    start = time.perf_counter()
    with pytest.raises(
        DeadlineError, match=r"'stuck' did not return within 0\.2 s \(reward\.timeout_seconds\), since \d\d:\d\d:\d\d"
    ):
        score_batch([bound(judge), bound(stuck)], BATCH, timeout_seconds=0.2)
    assert time.perf_counter() - start < 30
    assert cancelled.wait(5)


def test_a_coroutine_that_will_not_be_cancelled_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rayrlhf.rewards.score.GRACE_SECONDS", 0.3)
    release = threading.Event()

    async def deaf(responses: list[str]) -> list[float]:
        release.wait(30)  # blocks the loop
        return [0.0] * len(responses)

    with pytest.raises(DeadlineError, match="'deaf' did not return"):
        score_batch([bound(deaf)], BATCH, timeout_seconds=0.1)
    release.set()


def test_scoring_works_inside_a_running_event_loop():
    async def main() -> list[float]:
        return score_batch([bound(judge)], BATCH).scores.tolist()

    assert asyncio.run(main()) == [-1.0, -2.0, -3.0]


def test_synchronous_functions_stay_in_the_callers_thread():
    threads = []

    def where(responses: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return value(responses)

    score_batch([bound(judge), bound(where)], BATCH)
    assert threads == [threading.current_thread()]
