"""Metrics of a step from its tensors, under TRL's names.

The names are those of TRL 1.12.0 where it has one, else of TRL 0.11.4. Metrics of the update itself are sums of
`TokenLoss.statistics`; those here are computed by the driver.
"""

from torch import Tensor

from rayrlhf.algorithms.masking import masked_mean, masked_moments, zero_masked


def objective_statistics(
    logprobs: Tensor, kl: Tensor | None, non_score: Tensor, scores: Tensor, mask: Tensor
) -> dict[str, float]:
    """Return scores, KL and entropy of the step's responses.

    Args:
        logprobs: float [B, T], of the policy that sampled.
        kl: float [B, T], nats per token; None without a reference (KL 0 is reported).
        non_score: float [B, T], the KL part of the token rewards.
        scores: float [B], shaped.
        mask: bool [B, T], the action mask.

    Returns:
        `objective/kl`, `objective/entropy` (minus the log-prob) and `objective/non_score_reward`, each summed over a response
        and averaged over responses; `objective/scores`; `objective/rlhf_reward` (the sum of the last two); `ppo/std_scores`
        (unbiased, 0 for one response); `ppo/mean_non_score_reward` (per token).
    """
    non_score_sum = _sequence_mean(non_score, mask)
    return {
        "objective/kl": 0.0 if kl is None else _sequence_mean(kl, mask),
        "objective/entropy": _sequence_mean(-logprobs, mask),
        "objective/non_score_reward": non_score_sum,
        "objective/scores": scores.mean().item(),
        "objective/rlhf_reward": non_score_sum + scores.mean().item(),
        "ppo/std_scores": _std(scores),
        "ppo/mean_non_score_reward": masked_mean(non_score, mask).item(),
    }


def value_statistics(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
    """Return mean and unbiased variance of values and returns over the value mask.

    All are [B, T]; the values are those before the update.
    """
    _, value_mean, value_variance = masked_moments(values, mask)
    _, return_mean, return_variance = masked_moments(returns, mask)
    return {
        "ppo/val/mean": value_mean.item(),
        "ppo/val/var": value_variance.item(),
        "ppo/returns/mean": return_mean.item(),
        "ppo/returns/var": return_variance.item(),
    }


def length_statistics(query_lengths: Tensor, response_lengths: Tensor, stopped: Tensor) -> dict[str, float]:
    """Return mean and unbiased standard deviation of lengths, and the number of stopped responses.

    Lengths are tokens, int64 [B]; `stopped` is bool [B].
    """
    return {
        "tokens/queries_len_mean": query_lengths.double().mean().item(),
        "tokens/queries_len_std": _std(query_lengths.double()),
        "tokens/responses_len_mean": response_lengths.double().mean().item(),
        "tokens/responses_len_std": _std(response_lengths.double()),
        "val/num_eos_tokens": float(stopped.sum().item()),
    }


def explained_variance(squared_error: float, return_variance: float) -> float:
    """Return 1 - error / variance, the share of the returns' variance explained.

    This is TRL 0.11.4's `ppo/val/var_explained`.

    Args:
        squared_error: mean of (V - R)^2.
        return_variance: variance of R over the same tokens. If it is 0, the result is 0.
    """
    return 1 - squared_error / return_variance if return_variance > 0 else 0.0


def _sequence_mean(values: Tensor, mask: Tensor) -> float:
    return zero_masked(values, mask).sum(1).mean().item()


def _std(values: Tensor) -> float:
    return values.std().item() if values.numel() > 1 else 0.0
