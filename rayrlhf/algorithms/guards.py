"""When to leave a step: the policy moved too far from the one that sampled. Decide on global means, so that all ranks agree."""


def moved_too_far(policy_kl: float, target: float) -> bool:
    """Whether to stop the epochs of a step (TRL 0.11.4 `early_stopping`).

    Args:
        policy_kl: `ppo/policy/policykl` of a mini-batch, nats per token; signed, a negative one never stops.
        target: `target_kl`; the margin of 1.5 is TRL's.
    """
    return policy_kl > 1.5 * target


def ratio_exploded(mean_ratio: float, threshold: float) -> bool:
    """Whether to leave a mini-batch out since its mean ratio (`val/ratio`) exceeds TRL 0.11.4's `ratio_threshold`."""
    return mean_ratio > threshold
