import math

import pytest
import torch
from hypothesis import given

from rayrlhf.algorithms.statistics import (
    explained_variance,
    length_statistics,
    objective_statistics,
    value_statistics,
)
from tests.algorithms.batches import Batch, batches


@given(batches())
def test_objective_statistics_are_sums_over_a_response_averaged_over_responses(batch: Batch) -> None:
    logprobs, kl, non_score, scores = batch.logprobs(), batch.floats(), batch.floats(), batch.scores()
    ours = objective_statistics(*(batch.behind_nan(tensor) for tensor in (logprobs, kl, non_score)), scores, batch.mask)

    def per_response(values: torch.Tensor) -> float:
        return sum(values[row, mask].sum().item() for row, mask in enumerate(batch.mask)) / len(batch.mask)

    assert ours == pytest.approx(
        {
            "objective/kl": per_response(kl),
            "objective/entropy": -per_response(logprobs),
            "objective/non_score_reward": per_response(non_score),
            "objective/scores": scores.mean().item(),
            "objective/rlhf_reward": per_response(non_score) + scores.mean().item(),
            "ppo/std_scores": scores.std().item() if len(scores) > 1 else 0.0,
            "ppo/mean_non_score_reward": non_score[batch.mask].mean().item(),
        }
    )


@given(batches())
def test_without_a_reference_the_kl_is_reported_as_0(batch: Batch) -> None:
    ours = objective_statistics(batch.logprobs(), None, torch.zeros(batch.mask.shape), batch.scores(), batch.mask)
    assert ours["objective/kl"] == 0.0


@given(batches())
def test_value_statistics_read_nothing_behind_the_mask(batch: Batch) -> None:
    values, returns = batch.floats(), batch.floats()
    ours = value_statistics(batch.behind_nan(values), batch.behind_nan(returns), batch.mask)
    assert all(math.isfinite(value) for value in ours.values())
    assert ours["ppo/val/mean"] == pytest.approx(values[batch.mask].mean().item())
    assert ours["ppo/returns/mean"] == pytest.approx(returns[batch.mask].mean().item())


def test_length_statistics_of_one_response_have_no_spread() -> None:
    ours = length_statistics(torch.tensor([4]), torch.tensor([7]), torch.tensor([True]))
    assert ours == {
        "tokens/queries_len_mean": 4.0,
        "tokens/queries_len_std": 0.0,
        "tokens/responses_len_mean": 7.0,
        "tokens/responses_len_std": 0.0,
        "val/num_eos_tokens": 1.0,
    }


@pytest.mark.parametrize(
    ("error", "variance", "explained"), [(0.0, 2.0, 1.0), (2.0, 2.0, 0.0), (6.0, 2.0, -2.0), (1.0, 0.0, 0.0)]
)
def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_one_as_good_as_the_mean(
    error: float, variance: float, explained: float
) -> None:
    assert explained_variance(error, variance) == explained
