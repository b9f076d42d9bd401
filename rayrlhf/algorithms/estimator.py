"""What an advantage estimator is: a function from one step's experience to advantages, whatever it reads of it.

GAE reads token rewards and values; estimators that compare the samples of one prompt read scores and groups. A new one is a
file with such a function and a line in `advantages.ADVANTAGE_ESTIMATORS`.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AdvantageInputs:
    """The experience of one whole step, B responses of at most T slots.

    Attributes:
        rewards: float [B, T], per token (`rewards.token_rewards`).
        scores: float [B], shaped, one per response.
        groups: int64 [B]; responses to the same prompt share a number.
        mask: bool [B, T], the action mask.
        value_mask: bool [B, T], the action mask plus the slot of the score.
        values: float [B, T], the critic's; None without a critic.
    """

    rewards: Tensor
    scores: Tensor
    groups: Tensor
    mask: Tensor
    value_mask: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class Advantages:
    """What policy and critic learn from.

    Attributes:
        advantages: float [B, T].
        returns: float [B, T], the critic's targets; None from an estimator that trains no critic.
    """

    advantages: Tensor
    returns: Tensor | None


class AdvantageEstimator(Protocol):
    """The call that every estimator answers; one that has no use for an option ignores it."""

    def __call__(self, inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
        """Estimate advantages for one step, before whitening."""
        ...
