"""Values remembered by content."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.errors import UserError
from rayrlhf.rewards.cache import ContentCache
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch, load_functions
from rayrlhf.rewards.score import score_batch

SEEN: list[list[str]] = []


def lengths(responses, answer=None, factor=1):
    SEEN.append(list(responses))
    return [float(factor * len(response)) for response in responses]


async def slowly(responses):
    return lengths(responses)


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


def bound(function=lengths, most=100, **arguments):
    return BoundFunction("lengths", function, 1.0, arguments, ContentCache("lengths", most))


def ask(function, responses, **columns):
    return score_batch([function], ScoringBatch(["p"] * len(responses), responses, columns)).scores.tolist()


@pytest.mark.parametrize("function", [lengths, slowly])
def test_a_sample_that_was_seen_is_not_asked_again_and_equal_ones_are_asked_once(function):
    cached = bound(function)
    assert ask(cached, ["a", "bb", "a"]) == [1, 2, 1]
    assert ask(cached, ["ccc", "bb"]) == [3, 2]
    assert ask(cached, ["a", "ccc"]) == [1, 3]
    assert SEEN == [["a", "bb"], ["ccc"]]
    assert (cached.cache.requested, cached.cache.computed) == (7, 3)


def test_another_column_is_another_content_only_where_the_function_reads_it():
    cached = bound()
    ask(cached, ["a"], answer=[1], other=["x"])
    ask(cached, ["a"], answer=[1], other=["y"])
    ask(cached, ["a"], answer=[2], other=["x"])
    assert SEEN == [["a"], ["a"]]


@given(st.lists(st.lists(st.text("ab", max_size=2), min_size=1, max_size=6), max_size=8), st.integers(1, 4))
def test_a_cached_function_says_what_it_says_without_a_cache_however_small_the_cache(batches, most):
    cached, plain = bound(most=most), BoundFunction("lengths", lengths)
    for batch in batches:
        assert ask(cached, batch) == ask(plain, batch)
        assert len(cached.cache._values) <= most


def test_none_is_asked_again_because_it_may_be_a_failure_that_has_passed():
    answers = iter([[None, 1.0], [2.0]])
    cached = bound(lambda responses: next(answers))
    first = score_batch([cached, BoundFunction("other", lengths)], ScoringBatch(["p"] * 2, ["a", "b"]))
    np.testing.assert_array_equal(first.parts["lengths"], [np.nan, 1.0])
    assert ask(cached, ["a", "b"]) == [2.0, 1.0]


def test_what_a_cached_function_returns_is_checked_before_it_is_kept():
    cached = bound(lambda responses: [float("nan")] * len(responses))
    with pytest.raises(UserError, match="'lengths' returned float nan for sample 0"):
        ask(cached, ["a"])
    assert cached.cache._values == {}


def test_the_configuration_switches_it_on_and_refuses_what_cannot_be_cached():
    (function,) = load_functions(RewardSection(functions=[RewardFunctionSection(name="gsm8k", cache=True)]))
    assert function.cache is not None
    with pytest.raises(UserError, match="'environment' reads rollouts"):
        load_functions(RewardSection(functions=[RewardFunctionSection(name="environment", cache=True)]))
    everything = BoundFunction(
        "all", lambda responses, **columns: [float(len(columns))] * len(responses), cache=ContentCache("all")
    )
    batch = ScoringBatch(["p"], ["a"], {"answer": [1]}, rollouts=[object()])  # type: ignore[list-item]
    assert score_batch([everything], batch).scores.tolist() == [2.0]
    with pytest.raises(UserError, match="cache: true needs arguments of text"):
        ask(bound(), ["a"], answer=[{1, 2}])
