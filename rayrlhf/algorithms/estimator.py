"""Interface of advantage estimators: functions from the experience of one step to advantages.

GAE reads token rewards and values; estimators that compare the samples of one prompt read scores and groups. To add an
estimator, write such a function and a line in `advantages.ADVANTAGE_ESTIMATORS`, or a plugin named by `module:name` or
`path/to/file.py:name`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate

from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked


@dataclass(frozen=True)
class AdvantageInputs:
    """The experience of one whole step: B responses, at most T slots, right-padded.

    Attributes:
        rewards: float [B, T], per token (`reward_shaping.token_rewards`).
        scores: float [B], shaped, one per response; NaN for a response that failed.
        groups: int64 [B]; responses to the same prompt share a number.
        mask: bool [B, T], the action mask.
        value_mask: bool [B, T], the action mask plus the slot of the score.
        values: float [B, T], the critic's; None without a critic.
        baselines: float [B], shaped score of the greedy response to the same prompt; None unless the estimator reads it.
        votes: float [B], weight of each response in its group's moments; those of the parts of one sample add up to 1. None
            for 1 each.
        parts: float [B, K], unweighted values of the K rewards, NaN where one does not apply; None unless the estimator reads
            them.
        part_weights: float [K], their weights in the score.
        samples: int64 [B]; parts of one sample share a number. None if each response is a sample of its own.
    """

    rewards: Tensor
    scores: Tensor
    groups: Tensor
    mask: Tensor
    value_mask: Tensor
    values: Tensor | None
    baselines: Tensor | None = None
    votes: Tensor | None = None
    parts: Tensor | None = None
    part_weights: Tensor | None = None
    samples: Tensor | None = None

    @property
    def sequence_rewards(self) -> Tensor:
        """Total reward of each response, float [B]: shaped score plus any KL penalty."""
        return zero_masked(self.rewards, self.value_mask).sum(1)

    def broadcast(self, sequence_advantages: Tensor) -> Tensor:
        """Copy each response's advantage to its tokens.

        Float [B] to [B, T], 0 outside the action mask.
        """
        wide = sequence_advantages[:, None].expand(self.mask.shape)
        return zero_masked(wide.to(self.rewards.dtype), self.mask)


@dataclass(frozen=True)
class Advantages:
    """Training signals of policy and critic.

    Attributes:
        advantages: float [B, T].
        returns: float [B, T], the critic's targets; None from an estimator that trains no critic.
    """

    advantages: Tensor
    returns: Tensor | None


AdvantageEstimator = Callable[Concatenate[AdvantageInputs, ...], Advantages]
"""`estimator(inputs, gamma=..., lam=..., skip_masked=..., **arguments)`: advantages of one step, before whitening.

An estimator accepts the three options and ignores those it does not need; `arguments` are `algorithm.advantage.arguments`.
"""


@dataclass(frozen=True)
class AdvantageMethod:
    """An estimator and its requirements on a run.

    Attributes:
        estimate: the function.
        critic: it reads a critic's values, and the critic trains on its returns; without it no critic is started.
        whitened: whiten its advantages unless the config says otherwise.
        smallest_group: minimum number of samples per prompt.
        greedy: it reads the score of one greedy response to each prompt.
        parts: it reads the values of each reward, and neither token rewards nor shaped scores.
        teacher: it learns from a teacher alone, so a run must have one.
        pairs: a loss of pairs (`algorithm.online_dpo`) learns in place of a policy loss.
    """

    estimate: AdvantageEstimator
    critic: bool = False
    whitened: bool = False
    smallest_group: int = 1
    greedy: bool = False
    parts: bool = False
    teacher: bool = False
    pairs: bool = False
