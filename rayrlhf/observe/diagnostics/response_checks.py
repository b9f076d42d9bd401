"""Checks of responses: rewards, lengths, truncation."""

from rayrlhf.observe.diagnostics.finding import Sign, check
from rayrlhf.observe.diagnostics.history import History, Point, mean
from rayrlhf.observe.metric_names import CHANCE_LEVEL, REWARD_MODEL_CHANCE

SCORES, DEVIATION, HELD_OUT, LENGTH = "objective/scores", "ppo/std_scores", "evaluation/score", "tokens/responses_len_mean"
STOPPED, EPISODES, NO_CONTRAST = "val/num_eos_tokens", "episode", "frac_reward_zero_std"


@check("alarm", "Read the newest samples for errors that the reward misses; fix the reward or raise algorithm.kl.coefficient.")
def reward_hacking(history: History) -> Sign | None:
    """Detect training scores that rise while held-out scores fall since the best evaluation."""
    held_out = history.series(HELD_OUT)
    if len(held_out) < 2:
        return None
    best = max(held_out[:-1], key=lambda point: point.value)
    newest = held_out[-1]
    after = [point for point in history.series(SCORES) if point.step > best.step]
    if len(after) < 6:
        return None
    gain = mean(after[-3:]) - mean(after[:3])
    deviation = max(mean(history.recent(DEVIATION) or [Point(0, 0.0)]), 1e-6)
    lost = best.value - newest.value
    if gain <= 0.25 * deviation or lost <= 0.05 * max(abs(best.value), deviation):
        return None
    return Sign(
        best.step,
        f"training scores rose by {gain:.3f}, held-out ones fell from {best.value:.3f} to {newest.value:.3f}",
    )


@check("alarm", "Train the reward model longer, or on more or cleaner pairs: the policy cannot learn the preferences from it.")
def reward_model_by_chance(history: History) -> Sign | None:
    """Detect a reward model that ranks held-out pairs no better than chance."""
    points = history.all_recent(REWARD_MODEL_CHANCE, low=CHANCE_LEVEL, count=1)
    if not points:
        return None
    return Sign(
        points[0].step,
        f"coins order the reward model's held-out pairs as well as it does with probability {points[0].value:.2f}, "
        f"expected below {CHANCE_LEVEL}",
    )


@check("warning", "Add a length reward or algorithm.shaping.overlong_buffer, and check that the reward does not favor length.")
def length_explosion(history: History) -> Sign | None:
    """Detect responses twice as long as at the start."""
    change = history.change(LENGTH)
    if change is None or change.now <= 2 * max(change.before, 8.0):
        return None
    return Sign(change.since, f"responses have {change.now:.0f} tokens, {change.before:.0f} at the start")


@check(
    "alarm",
    "Read the samples: is the task too hard or too easy, or can the reward not parse answers? Try rollout.refill_rounds.",
)
def dead_reward(history: History) -> Sign | None:
    """Detect equal scores of all responses, which give no training signal."""
    if points := history.all_recent(DEVIATION, high=1e-6):
        return Sign(points[0].step, "all responses of a step have the same score")
    if points := history.all_recent(NO_CONTRAST, low=0.9):
        return Sign(points[0].step, f"in {mean(points):.0%} of the groups all responses have the same score")
    return None


@check(
    "warning", "Raise rollout.max_new_tokens, set algorithm.shaping.missing_eos_penalty, or start from a model that can stop."
)
def truncated_responses(history: History) -> Sign | None:
    """Detect truncation of more than half of the responses."""
    shares = _truncated(history)[-5:]
    if len(shares) < 5 or any(share.value <= 0.5 for share in shares):
        return None
    return Sign(shares[0].step, f"{mean(shares):.0%} of the responses were cut off at the length limit")


def _truncated(history: History) -> list[Point]:
    """Return the share of each step's responses without a stop token.

    The number of responses of a step is the increase of the episode count.
    """
    stopped = dict(history.series(STOPPED))
    shares, before = [], 0.0
    for step, episodes in history.series(EPISODES):
        if episodes > before and step in stopped:
            shares.append(Point(step, 1 - stopped[step] / (episodes - before)))
        before = episodes
    return shares


RESPONSE_CHECKS = (reward_hacking, reward_model_by_chance, length_explosion, dead_reward, truncated_responses)
