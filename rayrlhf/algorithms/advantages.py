"""The advantage estimators by name, and the one call that runs them."""

from rayrlhf.algorithms.dr_grpo import dr_grpo_estimator
from rayrlhf.algorithms.estimator import AdvantageInputs, AdvantageMethod, Advantages
from rayrlhf.algorithms.gae import gae_estimator
from rayrlhf.algorithms.grpo import grpo_estimator
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.reinforce import group_baseline_estimator, reinforce_estimator
from rayrlhf.algorithms.remax import remax_estimator
from rayrlhf.algorithms.rloo import rloo_estimator
from rayrlhf.algorithms.whitening import whiten

ADVANTAGE_ESTIMATORS: dict[str, AdvantageMethod] = {
    "gae": AdvantageMethod(gae_estimator, critic=True, whitened=True),
    "grpo": AdvantageMethod(grpo_estimator, smallest_group=2),
    "dr_grpo": AdvantageMethod(dr_grpo_estimator, smallest_group=2),
    "rloo": AdvantageMethod(rloo_estimator, smallest_group=2),
    "reinforce": AdvantageMethod(reinforce_estimator),
    "reinforce++": AdvantageMethod(reinforce_estimator, whitened=True),
    "reinforce++-baseline": AdvantageMethod(group_baseline_estimator, whitened=True, smallest_group=2),
    "remax": AdvantageMethod(remax_estimator, greedy=True),
}


def estimate_advantages(
    estimator: str, inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool, whitened: bool | None
) -> Advantages:
    """Advantages of one whole step by the named estimator; the returns keep their own scale.

    Args:
        estimator: a key of `ADVANTAGE_ESTIMATORS`.
        inputs: the step's experience.
        gamma: discount per action.
        lam: GAE's lambda.
        skip_masked: see `gae.gae`.
        whitened: whiten the advantages over the action mask, responses whose score is NaN left out; None does what is usual
            for the estimator.

    Returns:
        `Advantages`, with advantages 0 outside the action mask.

    Raises:
        ValueError: unknown estimator, or one that lacks an input.
    """
    if estimator not in ADVANTAGE_ESTIMATORS:
        raise ValueError(f"advantage estimator {estimator!r} is not one of {', '.join(ADVANTAGE_ESTIMATORS)}")
    method = ADVANTAGE_ESTIMATORS[estimator]
    result = method.estimate(inputs, gamma=gamma, lam=lam, skip_masked=skip_masked)
    if method.whitened if whitened is None else whitened:
        known = inputs.mask & ~inputs.scores.isnan()[:, None]
        return Advantages(whiten(result.advantages, known), result.returns)
    return Advantages(zero_masked(result.advantages, inputs.mask), result.returns)
