"""Checks of policy and critic: KL, entropy, ratio, explained variance."""

from rayrlhf.observe.diagnostics.finding import Sign, check
from rayrlhf.observe.diagnostics.history import History, mean
from rayrlhf.observe.metric_names import FIRST_RATIO

KL, ENTROPY, EXPLAINED = "objective/kl", "policy/entropy_avg", "ppo/val/var_explained"


@check("alarm", "Lower train.learning_rate or train.epochs, raise algorithm.kl.coefficient, or set train.early_stop_kl.")
def kl_blow_up(history: History) -> Sign | None:
    """Detect a KL from the reference of four times its baseline, unless it is small."""
    change = history.change(KL)
    if change is None or change.now <= 4 * max(change.before, 5.0):
        return None
    return Sign(change.since, f"KL to the reference is {change.now:.1f} nats per response, {change.before:.1f} at the start")


@check("warning", "A filter or minimum length truncates the sampling distribution, or the reference is not the initial model.")
def kl_negative(history: History) -> Sign | None:
    """Detect a clearly negative mean KL, which samples of the full distribution cannot have."""
    points = history.all_recent(KL, high=-1.0)
    if not points:
        return None
    return Sign(points[0].step, f"KL to the reference is {mean(points):.2f} nats per response; a true KL is never negative")


@check(
    "alarm",
    "Lower the learning rate, set algorithm.policy_loss.entropy_coefficient or a higher clip_high; look at the samples.",
)
def entropy_collapse(history: History) -> Sign | None:
    """Detect a policy whose responses have lost their variety."""
    change = history.change(ENTROPY)
    if change is None or change.now >= 0.1 or change.now >= 0.2 * change.before:
        return None
    return Sign(change.since, f"entropy is {change.now:.3f} nats per token, {change.before:.3f} at the start")


@check("warning", "Raise critic.learning_rate or algorithm.value_loss.coefficient, or set critic.warmup_steps.")
def critic_not_learning(history: History) -> Sign | None:
    """Detect a critic that predicts returns worse than their mean after ten steps."""
    points = history.all_recent(EXPLAINED, high=0.0, count=10)
    if not points:
        return None
    return Sign(points[0].step, f"values explain {mean(points):.2f} of the variance of returns; their mean would explain 0")


@check("alarm", "Old log-probs have other weights or settings: check dropout, precision and temperature.")
def first_ratio(history: History) -> Sign | None:
    """Detect a ratio other than 1 before the first update, where log-probs must be equal."""
    points = [point for point in history.recent(FIRST_RATIO, 1) if abs(point.value - 1) > 0.02]
    if not points:
        return None
    return Sign(points[0].step, f"the first update of the step has a ratio of {points[0].value:.3f} to the old policy, not 1")


POLICY_CHECKS = (kl_blow_up, kl_negative, entropy_collapse, critic_not_learning, first_ratio)
