"""Prometheus gauges of a run, exported by Ray with those of its nodes and actors.

The driver sets them once per step, so their cost is not measurable; `metrics.jsonl` stays the full record. Prometheus prefixes
each name with `ray_` and labels it with the run's name.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Gauge

from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.ppo.callbacks import Callback

if TYPE_CHECKING:
    from rayrlhf.ppo.evaluation import Evaluation
    from rayrlhf.ppo.scoring import ScoredRollouts

STEP_GAUGES: Mapping[str, tuple[str, str]] = {
    "rayrlhf_score": ("objective/scores", "Mean score of the step's responses."),
    "rayrlhf_kl_nats": ("objective/kl", "Mean KL from the reference, nats per response."),
    "rayrlhf_entropy_nats": ("objective/entropy", "Mean negative log-prob of the responses, nats per response."),
    "rayrlhf_response_tokens": ("tokens/responses_len_mean", "Mean length of a response."),
    "rayrlhf_sampler_gap_nats": (
        LOGPROB_GAP,
        "Mean log-prob difference between trainer and rollout engine: shows that the weights arrived.",
    ),
    "rayrlhf_policy_grad_norm": ("policy/grad_norm", "Mean norm of the policy's gradient before clipping."),
    "rayrlhf_policy_approx_kl_nats": ("policy/approxkl_avg", "Approximate KL between the policy before and after the step."),
    "rayrlhf_clip_fraction": ("policy/clipfrac_avg", "Share of tokens whose ratio was clipped."),
    "rayrlhf_weight_version": ("sync/version", "Weight version that all replicas serve."),
    "rayrlhf_sync_seconds": ("sync/seconds", "Time of the weight sync."),
    "rayrlhf_step_seconds": ("time/step", "Time of a step."),
    "rayrlhf_generate_seconds": ("time/generate", "Time of sampling in a step."),
    "rayrlhf_update_seconds": ("time/update_policy", "Time of the policy's update in a step."),
    "rayrlhf_tokens_per_second": ("speed/tokens_per_second", "Response tokens through the whole step, per second."),
}
"""Name of a gauge -> metric of the step, and description."""
STEP, LAST_STEP, HELD_OUT = "rayrlhf_step", "rayrlhf_last_step_timestamp_seconds", "rayrlhf_held_out_score"
OTHER_GAUGES: Mapping[str, str] = {
    STEP: "Steps done.",
    LAST_STEP: "Time at which the last step ended, seconds since 1970; it grows old when a run hangs.",
    HELD_OUT: "Mean score of the last evaluation on held-out prompts.",
}


class ClusterMetrics(Callback):
    """Sets the gauges of one run. Create it after `ray.init`."""

    def __init__(self, run: str) -> None:
        """Register the gauges under the run's name."""
        described = {name: text for name, (_, text) in STEP_GAUGES.items()} | dict(OTHER_GAUGES)
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in described.items()}
        self._tags = {"run": run}

    def on_step_end(self, step: int, metrics: Mapping[str, float], scored: "ScoredRollouts") -> None:
        """Set the gauges of a step; a metric that it lacks keeps its last value."""
        for name, (key, _) in STEP_GAUGES.items():
            if key in metrics:
                self._set(name, metrics[key])
        self._set(STEP, step)
        self._set(LAST_STEP, time.time())

    def on_evaluation(self, step: int, evaluation: "Evaluation") -> None:
        """Set the held-out score."""
        self._set(HELD_OUT, evaluation.mean_score)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(float(value), tags=self._tags)
