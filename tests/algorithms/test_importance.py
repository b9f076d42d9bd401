import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.importance import importance_weights, mismatch
from tests.algorithms.batches import Batch, batches


@given(batches(), st.floats(0, 0.9), st.floats(1.1, 5))
def test_weights_are_probability_ratios_inside_their_bounds(batch: Batch, low: float, high: float) -> None:
    trainer, sampler = batch.logprobs(), batch.logprobs()
    ratio = trainer.exp() / sampler.exp()
    inside = (ratio >= low) & (ratio <= high)
    truncated, masked = (
        importance_weights(batch.behind_nan(trainer), batch.behind_nan(sampler), batch.mask, mode=mode, low=low, high=high)
        for mode in ("truncate", "mask")
    )
    torch.testing.assert_close(truncated[batch.mask], ratio.clamp(low, high)[batch.mask])
    torch.testing.assert_close(masked[batch.mask], torch.where(inside, ratio, 0)[batch.mask])
    assert (truncated[~batch.mask] == 1).all()
    assert (masked[~batch.mask] == 1).all()


def test_an_unknown_sampler_logprob_means_no_correction() -> None:
    weights = importance_weights(torch.tensor([[-1.0]]), torch.tensor([[torch.nan]]), torch.tensor([[True]]))
    assert weights.tolist() == [[1.0]]


def test_weights_carry_no_gradient() -> None:
    trainer = torch.zeros(1, 1, requires_grad=True)
    assert not importance_weights(trainer, torch.zeros(1, 1), torch.tensor([[True]])).requires_grad


@given(batches())
def test_mismatch_is_0_between_equals_and_measures_the_gap_otherwise(batch: Batch) -> None:
    logprobs, noise = batch.logprobs(), batch.floats(0.1)
    assert set(mismatch(logprobs, logprobs, batch.mask).values()) == {0.0}
    measured = mismatch(batch.behind_nan(logprobs + noise), batch.behind_nan(logprobs), batch.mask)
    gap = noise[batch.mask]
    assert measured["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.abs().mean().item())
    assert measured["sampling/sampling_logp_difference/max"] == pytest.approx(gap.abs().max().item())
    assert measured["sampling/kl"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), abs=1e-12)


def test_a_nan_inside_the_mask_shows() -> None:
    values = mismatch(torch.tensor([[torch.nan, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert all(math.isnan(value) for value in values.values())
