"""The advantage estimators by name, and the one call that runs them."""

from rayrlhf.algorithms.estimator import AdvantageEstimator, AdvantageInputs, Advantages
from rayrlhf.algorithms.gae import gae_estimator
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.whitening import whiten

ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": gae_estimator,
}


def estimate_advantages(
    estimator: str, inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool, whitened: bool
) -> Advantages:
    """Advantages of one whole step by the named estimator; the returns keep their own scale.

    Args:
        estimator: a key of `ADVANTAGE_ESTIMATORS`.
        inputs: the step's experience.
        gamma: discount per action.
        lam: GAE's lambda.
        skip_masked: see `gae.gae`.
        whitened: whiten the advantages over the action mask.

    Returns:
        `Advantages`, with advantages 0 outside the action mask.

    Raises:
        ValueError: unknown estimator, or one that lacks an input.
    """
    if estimator not in ADVANTAGE_ESTIMATORS:
        raise ValueError(f"advantage estimator {estimator!r} is not one of {', '.join(ADVANTAGE_ESTIMATORS)}")
    result = ADVANTAGE_ESTIMATORS[estimator](inputs, gamma=gamma, lam=lam, skip_masked=skip_masked)
    finish = whiten if whitened else zero_masked
    return Advantages(finish(result.advantages, inputs.mask), result.returns)
