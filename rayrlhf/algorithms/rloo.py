"""RLOO: a response against the mean of the others to its prompt (Kool et al. 2019; Ahmadian et al. 2024, "Back to basics").

Leaving the response itself out keeps the baseline independent of it, and so the gradient unbiased. It equals n / (n - 1) times
the distance to the whole group's mean.
"""

import torch

from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.groups import group_moments, known_or_zero


def rloo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """R - mean of the others, the same for all tokens of a response; `gamma` and `lam` have no use here.

    R is `sequence_rewards`, with the summed KL where it is in the reward, as in TRL 1.16.0's `RLOOTrainer`.
    """
    rewards = inputs.sequence_rewards
    size, mean, _ = group_moments(rewards, inputs.groups)
    others = torch.where(size > 1, size - 1, torch.nan)
    return Advantages(inputs.spread(known_or_zero((rewards - mean) * size / others)), None)
