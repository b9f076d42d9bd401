"""Dr. GRPO: the group's mean is the baseline, without division by its spread (Liu et al. 2025, "Understanding R1-Zero").

Dividing by the spread weighs prompts that are nearly always or nearly never solved above the others. The paper's other change,
that long responses are not paid less per token, is the loss's: `algorithm.policy_loss.normalisation: constant`.
"""

from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.groups import group_moments, known_or_zero


def dr_grpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """R - mean over the group, the same for all tokens of a response; `gamma` and `lam` have no use here."""
    rewards = inputs.sequence_rewards
    advantages = rewards - group_moments(rewards, inputs.groups).mean
    # A group of one known response would be compared with itself, which gives 0 as it should.
    return Advantages(inputs.spread(known_or_zero(advantages)), None)
