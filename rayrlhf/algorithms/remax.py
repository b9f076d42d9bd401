"""ReMax: the score of the greedy response to a prompt is its baseline (Li et al. 2024, algorithm 1).

One sample a prompt is enough, and one greedy response beside it. Where greedy responses are far better or worse than samples,
as with a model that knows next to nothing, all advantages have one sign and drown the signal; `whiten: true` takes it out.
"""

from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.groups import known_or_zero
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.reinforce import rewards_to_go


def remax_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Rewards to go minus the greedy response's score; `lam` has no use here.

    A response has advantage 0 where its own reward or the baseline is NaN.

    Raises:
        ValueError: there are no baselines.
    """
    if inputs.baselines is None:
        raise ValueError("the advantage estimator 'remax' needs the scores of greedy responses")
    advantages = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked) - inputs.baselines[:, None]
    return Advantages(zero_masked(known_or_zero(advantages), inputs.mask), None)
