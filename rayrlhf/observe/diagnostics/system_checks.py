"""Checks of the system: log-prob mismatch, lost updates, staleness, idle processes, memory."""

from rayrlhf.observe.diagnostics.finding import Sign, check
from rayrlhf.observe.diagnostics.history import History, mean
from rayrlhf.observe.metric_names import (
    LOGPROB_GAP,
    MAX_STALENESS,
    MEMORY_LIMIT,
    PEAK_MEMORY,
    STALENESS_LIMIT,
    UPDATE_ARRIVED,
)

OTHER = "time_share/other"


@check(
    "alarm", "Set algorithm.off_policy_correction.level: token, use float32, or check that weight syncs arrive (sync/version)."
)
def sampler_mismatch(history: History) -> Sign | None:
    """Detect a gap between log-probs of trainer and rollout engine above 0.1 nats.

    bfloat16 alone gives about 0.03 nats.
    """
    limit = history.recent(STALENESS_LIMIT, 1)
    if limit and limit[0].value > 0:  # for older responses the gap includes the policy's change since
        return None
    points = history.all_recent(LOGPROB_GAP, low=0.1)
    if not points:
        return None
    return Sign(points[0].step, f"trainer and rollout engine differ by {mean(points):.3f} nats per token on fresh responses")


@check("warning", "Set rollout.lora: adapter (with rollout.backend: vllm), or model.dtype: float32.")
def update_lost(history: History) -> Sign | None:
    """Detect LoRA updates that are lost to rounding in the rollout engine."""
    points = [point for point in history.recent(UPDATE_ARRIVED, 1) if point.value < 0.5]
    if not points:
        return None
    return Sign(
        points[0].step, f"{points[0].value:.0%} of the adapters' update reached the rollout engine; rounding lost the rest"
    )


@check("alarm", "A replica serves old weights: look at recovery.jsonl.")
def stale_rollouts(history: History) -> Sign | None:
    """Detect responses sampled with older weights than the configuration allows."""
    limit = history.recent(STALENESS_LIMIT, 1)
    allowed = limit[0].value if limit else 0.0
    points = history.all_recent(MAX_STALENESS, low=allowed, count=1)
    if not points:
        return None
    return Sign(points[0].step, f"tokens were sampled {points[0].value:.0f} weight versions ago, {allowed:.0f} are allowed")


@check("warning", "Open trace.json in Perfetto to see the driver's work between the phases.")
def idle_actors(history: History) -> Sign | None:
    """Detect steps in which all actors are idle for a quarter of the time."""
    points = history.all_recent(OTHER, low=0.25, count=5)
    if not points:
        return None
    return Sign(points[0].step, f"no actor works in {mean(points):.0%} of the step; the driver or a callback delays all")


@check(
    "warning",
    "Lower rollout.memory_gib, train.micro_batch_tokens or train.score_batch_tokens; `rayrlhf plan` shows memory by role.",
)
def memory_limit(history: History) -> Sign | None:
    """Detect a peak above 90 % of the machine's memory."""
    peak, limit = history.recent(PEAK_MEMORY, 1), history.recent(MEMORY_LIMIT, 1)
    if not peak or not limit or peak[0].value <= 0.9 * limit[0].value:
        return None
    return Sign(peak[0].step, f"the run's processes used {peak[0].value:.1f} of {limit[0].value:.1f} GiB")


SYSTEM_CHECKS = (sampler_mismatch, update_lost, stale_rollouts, idle_actors, memory_limit)
