"""GRPO: by how many standard deviations a response beats the others to its prompt (Shao et al. 2024, section 4.1.2)."""

from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.groups import group_moments, known_or_zero

EPSILON = 1e-4
"""Added to the standard deviation (TRL 1.16.0), so that a group of equal rewards has advantage 0."""


def grpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """(R - mean) / (std + 1e-4) over the group, std unbiased, the same for all tokens of a response.

    R is `sequence_rewards`. The paper and TRL put the KL into the loss (`algorithm.kl.placement: loss`); where it is in the
    reward it is part of R. `gamma` and `lam` have no use here.
    """
    rewards = inputs.sequence_rewards
    moments = group_moments(rewards, inputs.groups)
    return Advantages(inputs.spread(known_or_zero((rewards - moments.mean) / (moments.std + EPSILON))), None)
