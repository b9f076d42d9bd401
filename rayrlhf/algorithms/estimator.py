"""What an advantage estimator is: a function from one step's experience to advantages, whatever it reads of it.

GAE reads token rewards and values; estimators that compare the samples of one prompt read scores and groups. A new one is a
file with such a function and a line in `advantages.ADVANTAGE_ESTIMATORS`.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked


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
        baselines: float [B], shaped score of the greedy response to the same prompt; None where nobody asked for it.
    """

    rewards: Tensor
    scores: Tensor
    groups: Tensor
    mask: Tensor
    value_mask: Tensor
    values: Tensor | None
    baselines: Tensor | None = None

    @property
    def sequence_rewards(self) -> Tensor:
        """What each response earned in all, float [B]: its shaped score, and its KL penalty where that is in the reward."""
        return zero_masked(self.rewards, self.value_mask).sum(1)

    def broadcast(self, sequence_advantages: Tensor) -> Tensor:
        """Give every token of a response the response's advantage: float [B] to float [B, T], 0 outside the action mask."""
        wide = sequence_advantages[:, None].expand(self.mask.shape)
        return zero_masked(wide.to(self.rewards.dtype), self.mask)


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


@dataclass(frozen=True)
class AdvantageMethod:
    """An estimator and what a run must give it.

    Attributes:
        estimate: the function.
        critic: it reads a critic's values, and the critic learns from its returns; without it no critic is started.
        whitened: whiten its advantages unless the config says otherwise.
        smallest_group: fewest samples of one prompt that tell it anything.
        greedy: it reads the score of one greedy response to each prompt.
    """

    estimate: AdvantageEstimator
    critic: bool = False
    whitened: bool = False
    smallest_group: int = 1
    greedy: bool = False
