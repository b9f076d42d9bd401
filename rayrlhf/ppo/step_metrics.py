"""Metrics of a step as one flat dictionary, with TRL's names where they exist."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rayrlhf.actors.placement import TrainRole
from rayrlhf.algorithms.statistics import explained_variance
from rayrlhf.data.records import Bool, Rollout
from rayrlhf.engines.train.plan import UpdateReport
from rayrlhf.errors import AlarmError
from rayrlhf.observe.metric_names import (
    FIRST_RATIO,
    LOGPROB_GAP,
    MAX_STALENESS,
    MEAN_STALENESS,
    PREFIX_CACHE_HIT_RATE,
    SCORE_ERROR,
    STALENESS_LIMIT,
)
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.functions import JUDGE_PART
from rayrlhf.weight_sync.driver import SyncReport


def step_metrics(
    experience: Experience, reports: Mapping[TrainRole, UpdateReport], sync: SyncReport, episodes: int
) -> dict[str, float]:
    """Return the metrics of experience, update and weight sync.

    Args:
        experience: the step's experience, with its own statistics.
        reports: update report of each learning role.
        episodes: responses sampled in the run so far.
    """
    metrics = dict(experience.metrics)
    for role, report in reports.items():
        metrics |= report.metrics
        metrics |= {
            f"{role}/grad_norm": sum(report.grad_norms) / max(len(report.grad_norms), 1),
            f"{role}/optimizer_steps": float(report.optimizer_steps),
            f"{role}/padding_share": report.padding_share,
            f"{role}/stopped_early": float(report.stopped_early),
            f"{role}/guarded_steps": float(report.guarded_steps),
            f"{role}/skipped_steps": float(report.skipped_steps),
        }
        metrics |= {f"time/{role}/{part}": seconds for part, seconds in report.seconds.items()}
    if "ppo/val/error" in metrics and "ppo/returns/var" in metrics:
        metrics["ppo/val/var_explained"] = explained_variance(metrics["ppo/val/error"], metrics["ppo/returns/var"])
    metrics |= next(iter(reports.values())).token_metrics if reports else {}
    first = reports["policy"].step_metrics[:1] if "policy" in reports else []
    if first and "val/ratio" in first[0]:
        metrics[FIRST_RATIO] = first[0]["val/ratio"]
    if first and LOGPROB_GAP in first[0]:
        metrics[LOGPROB_GAP] = first[0][LOGPROB_GAP]  # later optimizer steps also differ by the update
    if "policy" in reports and reports["policy"].learning_rates:
        metrics["lr"] = reports["policy"].learning_rates[-1]
    metrics |= {"episode": float(episodes), "sync/seconds": sync.seconds, "sync/version": float(sync.version)}
    return metrics


def staleness_metrics(rollouts: Sequence[Rollout], version: int, limit: int = 0) -> dict[str, float]:
    """Return mean and maximum age of a step's tokens, in weight versions.

    Args:
        version: of the policy that trains on them. Tokens sampled before the first sync count as version 0.
        limit: maximum age, `async.max_staleness`.
    """
    ages = version - np.maximum(np.concatenate([rollout.versions for rollout in rollouts]), 0)
    return {MEAN_STALENESS: float(ages.mean()), MAX_STALENESS: float(ages.max()), STALENESS_LIMIT: float(limit)}


def cache_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the hit rate of the prefix cache; empty where the rollout engine has none."""
    read = sum(rollout.read_tokens for rollout in rollouts)
    return {PREFIX_CACHE_HIT_RATE: sum(rollout.cached_tokens for rollout in rollouts) / read} if read else {}


def check_gap(step: int, gap: float | None, allowed: float) -> None:
    """Check the log-prob gap of trainer and rollout engine under the same weights.

    The update names log-probs that are not finite.

    Args:
        step: PPO steps done.
        gap: nats per token; None where no token was sampled with the newest weights.
        allowed: `rollout.mismatch_alarm`.

    Raises:
        AlarmError: it is larger than allowed.
    """
    if gap is not None and math.isfinite(gap) and gap > allowed:
        raise AlarmError(
            f"step {step}: log-probs of trainer and rollout engine differ by {gap:.3g} nats on average, above "
            f"rollout.mismatch_alarm {allowed:.3g}: the rollout engine does not serve the policy's weights"
        )


def fresh_gap(trainer_logprobs: np.ndarray, counted: np.ndarray, rollouts: Sequence[Rollout], version: int) -> float | None:
    """Return the log-prob gap between trainer and rollout engine under the same weights.

    Tokens sampled with older weights also differ by the updates since, and show nothing.

    Args:
        trainer_logprobs: float [B, T], a row per rollout.
        counted: bool [B, T], the tokens that are trained on.
        version: of the policy that trains on them. Tokens sampled before the first sync count as version 0.

    Returns:
        Mean absolute difference in nats over the tokens of this version; None without any.
    """
    gaps = [
        np.abs(row[: len(rollout.logprobs)] - rollout.logprobs)[
            mask[: len(rollout.logprobs)] & (np.maximum(rollout.versions, 0) == version)
        ]
        for row, mask, rollout in zip(trainer_logprobs, counted, rollouts, strict=True)
    ]
    together = np.concatenate(gaps)
    return float(together.mean()) if len(together) else None


def reward_metrics(scored: ScoredRollouts, own: Bool | None = None) -> dict[str, float]:
    """Return the mean of each reward part, and the standard error of the score.

    With a judge also the share of samples without its score. A part's mean is over the samples that it applies to. The error is
    over prompts, which are independent; the responses to one prompt are not. It is missing for a single prompt.

    Args:
        own: bool [B], samples to count; all if None.
    """
    own = np.ones(len(scored.rollouts), np.bool_) if own is None else own
    metrics = {}
    for name, values in scored.rewards.parts.items():
        present = values[own & ~np.isnan(values)]
        if len(present):
            metrics[f"reward/{name}"] = float(present.mean())
    if JUDGE_PART in scored.rewards.parts:
        metrics[f"reward/{JUDGE_PART}_missing"] = float(np.isnan(scored.rewards.parts[JUDGE_PART][own]).mean())
    scores = scored.rewards.scores
    known = own & ~np.isnan(scores)
    prompts = np.array([rollout.key.prompt for rollout in scored.rollouts])[known]
    _, groups, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(sizes) > 1:
        means = np.bincount(groups, weights=scores[known]) / sizes
        metrics[SCORE_ERROR] = float(means.std(ddof=1) / np.sqrt(len(means)))
    return metrics
