import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms.importance import accepted_responses, importance_weights, mismatch, weight_statistics
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


def test_icepop_drops_the_tokens_on_which_the_engines_differ() -> None:
    ratios = torch.tensor([[0.49, 0.51, 1.0, 4.9, 5.1, 9.0]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    weights = importance_weights(ratios.log(), torch.zeros(1, 6), mask, mode="mask", level="token", low=0.5, high=5.0)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.51, 1.0, 4.9, 0.0, 1.0]]))


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


@settings(max_examples=20)
@given(batches(holes=False), st.sampled_from(["token", "sequence"]), st.sampled_from(["truncate", "mask"]))
def test_every_level_and_mode_is_that_of_trls_trainer(batch: Batch, level: str, mode: str) -> None:
    from trl import GRPOTrainer

    from tests.algorithms.trl_group import trl_experience

    width = int(batch.mask.sum(1).max())
    mask = batch.mask[:, :width]
    trainer, sampler = batch.logprobs()[:, :width], batch.logprobs()[:, :width]
    sampler[0, 0] = torch.nan
    theirs = trl_experience(
        GRPOTrainer, torch.ones(len(mask)), mask, trainer, sampler=sampler, num_generations=1,
        vllm_importance_sampling_mode=f"{level}_{mode}", vllm_importance_sampling_clip_min=0.25,
    )["importance_sampling_ratio"]  # fmt: skip
    ours = importance_weights(trainer, sampler, mask, mode=mode, level=level, low=0.25, high=3.0)
    torch.testing.assert_close(ours, torch.where(mask, theirs.expand(mask.shape), 1.0), atol=1e-5, rtol=1e-5)


def test_statistics_count_what_the_bounds_took_hold_of() -> None:
    trainer = torch.tensor([[0.0, 2.0, 9.0]]).double().log()
    mask = torch.tensor([[True, True, True]])
    trainer[0, 0] = 0.0
    nothing = torch.zeros(1, 3).double()
    weights, raw = (importance_weights(trainer, nothing, mask, high=high) for high in (3.0, math.inf))
    assert weight_statistics(weights, raw, mask) == pytest.approx(
        {
            "sampling/importance_sampling_ratio/min": 1.0,
            "sampling/importance_sampling_ratio/mean": 2.0,
            "sampling/importance_sampling_ratio/max": 3.0,
            "sampling/importance_bounded": 1 / 3,
        }
    )


@given(batches(), st.floats(0.2, 0.99), st.floats(1.01, 4))
def test_a_response_is_accepted_by_the_mean_the_product_or_the_extremes_of_its_ratios(
    batch: Batch, low: float, high: float
) -> None:
    trainer, sampler = batch.logprobs(), batch.logprobs()
    found = {
        rejection: accepted_responses(
            batch.behind_nan(trainer), batch.behind_nan(sampler), batch.mask, rejection=rejection, low=low, high=high
        )
        for rejection in ("geometric", "product", "outlier")
    }
    for row, mask in enumerate(batch.mask):
        ratios = (trainer[row] - sampler[row])[mask].exp().tolist()
        product = math.prod(ratios)
        assert found["product"][row] == (low <= product <= high)
        assert found["geometric"][row] == (low <= product ** (1 / len(ratios)) <= high)
        assert found["outlier"][row] == all(low <= ratio <= high for ratio in ratios)


def test_an_unknown_sampler_logprob_rejects_no_response() -> None:
    unknown = torch.tensor([[torch.nan, 0.0]])
    assert accepted_responses(
        unknown, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), rejection="outlier", low=0.5, high=2
    ).tolist() == [True]
