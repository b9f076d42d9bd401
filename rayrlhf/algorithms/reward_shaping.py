"""Score shaping, and token rewards from one score per response.

Scores are scaled and centered by the running moments of all scores of the run. A response close to the length limit gets the
overlong penalty (DAPO, Yu et al. 2025, equation 13).

Every sampled token carries a KL penalty, and one slot receives the score: the last sampled token (TRL up to 0.11), or the slot
after it (TRL 0.12 to 1.12), whose value the critic then learns too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked

ScorePosition = Literal["last", "after_last"]


@dataclass(frozen=True)
class TokenRewards:
    """Reward of each token.

    Attributes:
        rewards: float [B, T], KL penalty plus scores; 0 outside `value_mask`.
        non_score: float [B, T], the KL penalty alone, -beta * KL; 0 outside the action mask.
        value_mask: bool [B, T], the action mask plus the slot of the score; rewards, values and returns are defined there.
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
    """Return r_t = -beta * KL_t, plus the score at one slot (TRL 0.11.4, 1.12.0).

    Args:
        kl: float [B, T], nats per token; None if the reward has no KL.
        scores: float [B], one per response.
        mask: bool [B, T], the action mask.
        coefficient: beta.
        position: slot that receives the score, see `score_slots`.
        token_scores: float [B, T], rewards per token in addition to the score; read on the action mask.

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
    """Return the column that receives each response's score, int64 [B].

    Args:
        mask: bool [B, T], the action mask. For `after_last`, T must be `slot_count(...)`, so that only responses of the full
            length have no slot of their own.
        position: `last` is the last True column s (TRL 0.11.4); `after_last` is s + 1, or s at the right edge (TRL 1.12.0).

    Raises:
        ValueError: a row without any action.
    """
    if not mask.any(1).all():
        raise ValueError(f"rows {(~mask.any(1)).nonzero().flatten().tolist()} of the action mask have no action")
    width = mask.shape[1]
    last = width - 1 - mask.flip(1).int().argmax(1)
    return last if position == "last" else (last + 1).clamp(max=width - 1)


def slot_count(longest: int, limit: int, position: ScorePosition = "last") -> int:
    """Return the number of columns T of a step's tensors.

    It is the `longest` response, plus one with `after_last` unless that response has the full `limit` of tokens.
    """
    return longest if position == "last" else min(longest + 1, limit)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """Return the overlong penalty, float32 [B].

    It is 0 up to `limit - buffer` tokens, falls linearly to -1 at the limit, and stays -1 beyond.

    Args:
        lengths: int64 [B], tokens of each response.
        limit: largest number of response tokens.
        buffer: length of the penalized zone before the limit, in tokens, >= 1.
    """
    return -((lengths - (limit - buffer)).float() / buffer).clamp(0, 1)


SMALLEST_STD = torch.finfo(torch.float32).eps
"""Added to the standard deviation (TRL 0.11.4); scores with a smaller one count as all equal."""


class RunningMoments:
    """Running moments of scores, by the parallel form of Welford's update.

    See Chan et al. (1979); the same as in TRL 0.11.4.

    Attributes:
        count: scores seen; 1e-24 before the first, as in TRL, so that the update needs no special case.
        mean: their mean.
        variance: their population variance.
        std: their standard deviation, unbiased; 1 until there are two scores.
    """

    def __init__(self) -> None:
        self.count = 1e-24
        self.mean = 0.0
        self.variance = 1.0
        self.std = 1.0

    def update(self, scores: Tensor) -> None:
        """Add a batch of scores, float [B].

        Raises:
            ValueError: the batch is empty, or a score is not finite, which would invalidate every later mean.
        """
        if not scores.numel() or not scores.isfinite().all():
            raise ValueError(f"running moments need finite scores, got {scores.tolist()}")
        batch = scores.double()
        size = batch.numel()
        total = self.count + size
        delta = batch.mean().item() - self.mean
        squares = self.variance * self.count + batch.var(correction=0).item() * size + delta**2 * self.count * size / total
        self.mean += delta * size / total
        self.count = total
        self.variance = squares / total
        self.std = (squares / (total - 1)) ** 0.5 if total > 1 else 1.0

    def state_dict(self) -> dict[str, float]:
        """Return the state that a resumed run needs."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance, "std": self.std}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved state."""
        self.count, self.mean = state["count"], state["mean"]
        self.variance, self.std = state["variance"], state["std"]


def shape_scores(
    scores: Tensor, moments: RunningMoments, *, scale: bool = False, center: bool = False, clip: float | None = None
) -> Tensor:
    """Center, scale and clip the scores of one step, in this order.

    TRL 0.11.4 calls these `use_score_norm`, `use_score_scaling` and `score_clip`, and centers only if it scales. With `scale`
    or `center` the batch is first added to `moments`: call once per step.

    Args:
        scores: float [B].
        moments: of the run so far.
        scale: divide by the running standard deviation, or by 1 while all scores are equal (TRL divides by 1e-7 then).
        center: subtract the running mean.
        clip: bound of the absolute value; None sets no bound.

    Returns:
        Float [B].

    Raises:
        ValueError: see `RunningMoments.update`.
    """
    if scale or center:
        moments.update(scores)
    shaped = scores - moments.mean if center else scores
    if scale and moments.std > SMALLEST_STD:
        shaped = shaped / (moments.std + SMALLEST_STD)
    return shaped if clip is None else shaped.clamp(-clip, clip)


def penalize_missing_stop(scores: Tensor, stopped: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores [B] of responses without a stop token.

    This is TRL 1.12.0's `missing_eos_penalty`.

    Args:
        scores: float [B].
        stopped: bool [B].
        penalty: in units of the score.
    """
    return torch.where(stopped, scores, scores - penalty)
