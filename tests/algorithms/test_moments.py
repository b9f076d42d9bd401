import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rayrlhf.algorithms.reward_shaping import RunningMoments, penalize_missing_stop, shape_scores

scores = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


@given(st.lists(scores, min_size=1, max_size=4))
def test_moments_over_batches_are_those_of_all_scores_at_once(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    every = np.array([score for batch in batches for score in batch], dtype=np.float64)
    assert moments.count == len(every)
    assert moments.mean == pytest.approx(every.mean(), abs=1e-9)
    assert moments.variance == pytest.approx(every.var(), abs=1e-7)
    assert moments.std == pytest.approx(every.std(ddof=1) if len(every) > 1 else 1.0, abs=1e-5)


@given(scores, scores)
def test_resumed_moments_are_the_same(first: list[float], second: list[float]) -> None:
    whole, before, after = RunningMoments(), RunningMoments(), RunningMoments()
    whole.update(torch.tensor(first))
    whole.update(torch.tensor(second))
    before.update(torch.tensor(first))
    after.load_state_dict(before.state_dict())
    after.update(torch.tensor(second))
    assert after.state_dict() == whole.state_dict()


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=6), st.floats(0.1, 2))
def test_scores_are_centred_then_scaled_then_clipped(values: list[float], clip: float) -> None:
    every = np.array(values)
    assume(every.std() > 1e-3)
    shaped = shape_scores(torch.tensor(values), RunningMoments(), scale=True, center=True, clip=clip)
    expected = ((every - every.mean()) / every.std(ddof=1)).clip(-clip, clip)
    np.testing.assert_allclose(shaped.numpy(), expected, atol=1e-3)


def test_without_options_scores_and_moments_stay_as_they_are() -> None:
    moments = RunningMoments()
    values = torch.tensor([3.0, -1.0])
    assert torch.equal(shape_scores(values, moments), values)
    assert moments.state_dict() == RunningMoments().state_dict()


def test_equal_scores_are_not_blown_up() -> None:
    assert shape_scores(torch.full((5,), 0.1), RunningMoments(), scale=True).tolist() == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")]])
def test_a_score_that_is_not_finite_never_enters_the_moments(bad: list[float]) -> None:
    moments = RunningMoments()
    with pytest.raises(ValueError, match="finite scores"):
        moments.update(torch.tensor(bad))
    assert moments.state_dict() == RunningMoments().state_dict()


def test_only_responses_that_did_not_stop_pay_the_penalty() -> None:
    penalised = penalize_missing_stop(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), 1.5)
    assert penalised.tolist() == [2.0, 0.5]
