"""From one score per response to one reward per token.

Every sampled token pays for leaving the reference, and one slot receives the score: the last sampled token (TRL classic), or
the slot after it (TRL modern), whose value the critic then learns as well.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked

ScorePosition = Literal["last", "after_last"]


@dataclass(frozen=True)
class TokenRewards:
    """What each token earned.

    Attributes:
        rewards: float [B, T], KL penalty plus scores; 0 outside `value_mask`.
        non_score: float [B, T], the KL penalty alone, -beta * KL; 0 outside the action mask.
        value_mask: bool [B, T], the action mask plus the slot of the score: where rewards, values and returns live.
    """

    rewards: Tensor
    non_score: Tensor
    value_mask: Tensor


def token_rewards(
    kl: Tensor | None,
    scores: Tensor,
    mask: Tensor,
    coefficient: float,
    *,
    position: ScorePosition = "last",
    token_scores: Tensor | None = None,
) -> TokenRewards:
    """Spread KL penalty and score over the tokens: r_t = -beta * KL_t, plus the score at one slot (TRL 0.11.4, 1.12.0).

    Args:
        kl: float [B, T], nats per token; None when the reward carries no KL.
        scores: float [B], one per response.
        mask: bool [B, T], the action mask.
        coefficient: beta.
        position: which slot receives the score, see `score_slots`.
        token_scores: float [B, T], rewards per token that a reward function gave beside the score; read on the action mask.

    Raises:
        ValueError: a row without any action.
    """
    slots = score_slots(mask, position)[:, None]
    non_score = torch.zeros_like(mask, dtype=scores.dtype) if kl is None else zero_masked(-coefficient * kl, mask)
    rewards = non_score if token_scores is None else non_score + zero_masked(token_scores, mask)
    return TokenRewards(
        rewards=rewards.scatter_add(1, slots, scores[:, None].to(rewards.dtype)),
        non_score=non_score,
        value_mask=mask.scatter(1, slots, True),
    )


def score_slots(mask: Tensor, position: ScorePosition = "last") -> Tensor:
    """Find the column that receives each response's score, int64 [B].

    Args:
        mask: bool [B, T], the action mask. For `after_last`, T must be `slot_count(...)`, so that only responses of the full
            length lack a slot of their own.
        position: `last` is the last True column s (TRL 0.11.4); `after_last` is s + 1, or s at the right edge (TRL 1.12.0).

    Raises:
        ValueError: a row without any action.
    """
    if not mask.any(1).all():
        raise ValueError(f"rows {(~mask.any(1)).nonzero().flatten().tolist()} of the action mask have no action to reward")
    width = mask.shape[1]
    last = width - 1 - mask.flip(1).int().argmax(1)
    return last if position == "last" else (last + 1).clamp(max=width - 1)


def slot_count(longest: int, limit: int, position: ScorePosition = "last") -> int:
    """Count the columns T that a step's tensors need.

    Room for the `longest` response, and with `after_last` for the slot after it unless it has the full `limit` of tokens.
    """
    return longest if position == "last" else min(longest + 1, limit)
