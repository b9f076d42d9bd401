"""Turns scored rollouts into training data: token rewards, advantages, returns.

All of it is per-token scalars on the driver, so whitening and running moments cover the whole step and do not depend on the
number of ranks. The formulas are in `rayrlhf.algorithms`; this module applies them in order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import estimate_advantages, has_contrast
from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.importance import importance_weights, mismatch, weight_statistics
from rayrlhf.algorithms.kl import kl_controller, kl_penalty
from rayrlhf.algorithms.masking import whiten
from rayrlhf.algorithms.reward_shaping import (
    RunningMoments,
    overlong_penalty,
    penalize_missing_stop,
    shape_scores,
    slot_count,
    token_rewards,
)
from rayrlhf.algorithms.statistics import length_statistics, objective_statistics, value_statistics
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Records, Rollout, TokenScores
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.environments.episodes import sample_votes, turn_weight
from rayrlhf.ppo.scoring import ScoredRollouts

CONTEXT = "context/"
"""Prefix of the same metrics where the rollout engine reads demonstrations that the trainer does not."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One step's experience.

    Attributes:
        batch: sequences and the arrays that the objectives read.
        kl: float [B], nats per sequence; zeros without a reference.
        metrics: statistics of the step before its update, with TRL's names.
    """

    batch: TrainingBatch
    kl: Tensor
    metrics: dict[str, float]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def learnable(self) -> list[int]:
        """Rows of the batch with tokens to train on."""
        return [int(row) for row in np.flatnonzero(self.batch.arrays["action_mask"].any(1))]


class ExperienceMaker:
    """Makes experience; keeps the KL coefficient and running moments between steps."""

    def __init__(self, config: PPOConfig) -> None:
        self._config = config
        kl = config.algorithm.kl
        self._controller = kl_controller(kl.coefficient, kl.target, kl.horizon)
        self._moments = RunningMoments()

    @property
    def kl_coefficient(self) -> float:
        """KL coefficient of the next step."""
        return self._controller.value

    def make(self, scored: ScoredRollouts) -> Experience:
        """Make one step's experience and update the KL controller."""
        algorithm = self._config.algorithm
        rollouts = scored.rollouts
        position = algorithm.shaping.score_position
        longest = max(len(rollout.response_ids) for rollout in rollouts)
        width = slot_count(longest, self._config.rollout.max_new_tokens, position)
        mask = _padded([rollout.action_mask for rollout in rollouts], width).bool()
        engine = _padded([rollout.logprobs for rollout in rollouts], width)
        recomputed = self._config.old_logprobs == "recomputed"
        logprobs = _forward_passes(scored, "policy", "logprobs", width) if recomputed else engine
        scores = self._shape(scored)
        kl = None
        if "reference" in scored.forward_passes:
            kl = kl_penalty(
                logprobs,
                _forward_passes(scored, "reference", "logprobs", width),
                algorithm.kl.estimator,
                algorithm.kl.arguments,
            )
        in_reward = kl if algorithm.kl.placement == "reward" else None
        coefficient = self._controller.value
        at_end, by_token = self._credited(scores, scored, width)
        earned = token_rewards(in_reward, at_end, mask, coefficient, position=position, token_scores=by_token)
        rewards = earned.rewards
        if algorithm.shaping.whiten_rewards:
            rewards = whiten(rewards, earned.value_mask, shift_mean=False)
        values = self._values(scored, width)
        groups = torch.tensor([rollout.key.prompt for rollout in rollouts])
        environment = self._config.environment
        votes = torch.from_numpy(sample_votes(rollouts)) if environment and environment.votes == "sample" else None
        inputs = AdvantageInputs(rewards, scores, groups, mask, earned.value_mask, values, self._baselines(scored), votes)
        result = self._estimate(inputs)
        kept = self._kept(rollouts)[:, None]
        arrays = {"advantages": result.advantages, "action_mask": mask & kept}
        if self._config.old_logprobs != "skipped":
            arrays["old_logprobs"] = logprobs
        if values is not None and result.returns is not None:
            arrays |= {"old_values": values, "returns": result.returns, "value_mask": earned.value_mask & kept}
        if algorithm.policy_loss.kind == "plugin" or not recomputed:
            arrays["rollout_logprobs"] = engine
        if "reference" in scored.forward_passes:
            arrays["ref_logprobs"] = _forward_passes(scored, "reference", "logprobs", width)
        weights, weight_metrics = self._corrected(logprobs, engine, mask)
        batch = TrainingBatch(
            Records(rollout.sequence() for rollout in rollouts), {k: v.numpy() for k, v in (arrays | weights).items()}
        )
        metrics = self._metrics(rollouts, logprobs, kl, earned.non_score, scores, mask) | weight_metrics
        if recomputed:
            metrics |= self._gap(logprobs, engine, mask)
        if self._config.rollout.samples_per_prompt > 1:
            metrics["frac_reward_zero_std"] = 1 - has_contrast(scores, groups).float().mean().item()
        if values is not None and result.returns is not None:
            metrics |= value_statistics(values, result.returns, earned.value_mask)
        sequence_kl = torch.zeros(len(rollouts)) if kl is None else torch.where(mask, kl, torch.zeros_like(kl)).sum(1)
        self._controller.update(float(sequence_kl.mean()), len(rollouts))
        return Experience(batch, sequence_kl, metrics | {"objective/kl_coef": coefficient})

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"controller": self._controller.state_dict(), "moments": self._moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state."""
        self._controller.load_state_dict(state["controller"])
        self._moments.load_state_dict(state["moments"])

    def _estimate(self, inputs: AdvantageInputs) -> Advantages:
        section = self._config.algorithm.advantage
        return estimate_advantages(
            section.estimator,
            inputs,
            gamma=section.gamma,
            lam=section.lam,
            skip_masked=section.skip_masked,
            whitened=section.whiten,
            arguments=section.arguments,
        )

    def _shape(self, scored: ScoredRollouts) -> Tensor:
        shaping = self._config.algorithm.shaping
        penalized = self._penalized(scored)
        return shape_scores(penalized, self._moments, scale=shaping.scale, center=shaping.center, clip=shaping.clip)

    def _credited(self, scores: Tensor, scored: ScoredRollouts, width: int) -> tuple[Tensor, Tensor | None]:
        """Split scores [B] into rewards at the end and per token [B, T], if any."""
        parts: list[Tensor] = []
        weight = turn_weight(self._config)
        paid = [rollout.rewards for rollout in scored.rollouts if rollout.rewards is not None]
        if weight and paid:
            parts.append(weight * _padded(paid, width))
        if scored.rewards.tokens is not None:
            rows = zip(scored.rewards.tokens, scored.rollouts, strict=True)
            filled = [np.zeros(len(rollout.response_ids), np.float32) if row is None else row for row, rollout in rows]
            parts.append(_padded(filled, width))
        if not parts:
            return scores, None
        by_token = torch.stack(parts).sum(0)
        return scores - by_token.sum(1), by_token

    def _baselines(self, scored: ScoredRollouts) -> Tensor | None:
        """Return the shaped score of the greedy response to each rollout's prompt, float [B].

        The configuration allows no scaling of scores with it.
        """
        if scored.greedy is None:
            return None
        clip = self._config.algorithm.shaping.clip
        shaped = shape_scores(self._penalized(scored.greedy), self._moments, clip=clip)
        by_prompt = {rollout.key.prompt: score for rollout, score in zip(scored.greedy.rollouts, shaped, strict=True)}
        return torch.stack([by_prompt[rollout.key.prompt] for rollout in scored.rollouts])

    def _penalized(self, scored: ScoredRollouts) -> Tensor:
        """Return the scores with the penalties for length and a missing stop token, float [B]."""
        scores, rollouts = torch.from_numpy(scored.rewards.scores), scored.rollouts
        shaping, limit = self._config.algorithm.shaping, self._config.rollout.max_new_tokens
        buffer = self._config.overlong_tokens
        if buffer is not None:
            lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
            scores = scores + shaping.overlong_penalty * overlong_penalty(lengths, limit, buffer)
        if shaping.missing_eos_penalty is not None:
            stopped = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])
            scores = penalize_missing_stop(scores, stopped, shaping.missing_eos_penalty)
        return scores

    def _kept(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Mask the responses to train on, bool [B]."""
        if self._config.algorithm.shaping.truncated == "keep":
            return torch.ones(len(rollouts), dtype=torch.bool)
        return torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])

    def _corrected(self, logprobs: Tensor, engine: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the importance weights of the off-policy correction, if any, and their metrics."""
        section = self._config.algorithm.off_policy_correction
        if section.level == "none":
            return {}, {}
        weigh = partial(importance_weights, logprobs, engine, mask, level=section.level)
        weights = weigh(mode=section.mode, low=section.low, high=section.high)
        return {"importance_weights": weights}, weight_statistics(weights, weigh(low=0.0, high=math.inf), mask)

    def _values(self, scored: ScoredRollouts, width: int) -> Tensor | None:
        if self._config.critic.kind == "none":
            return None
        owner = "policy" if self._config.critic.kind == "shared" else "critic"
        return _forward_passes(scored, owner, "values", width)

    def _metrics(
        self,
        rollouts: Sequence[Rollout],
        logprobs: Tensor,
        kl: Tensor | None,
        non_score: Tensor,
        scores: Tensor,
        mask: Tensor,
    ) -> dict[str, float]:
        queries = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
        responses = torch.tensor([int(rollout.action_mask.sum()) for rollout in rollouts])
        stopped = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])
        objective = objective_statistics(logprobs, kl, non_score, scores, mask)
        return objective | length_statistics(queries, responses, stopped)

    def _gap(self, logprobs: Tensor, engine: Tensor, mask: Tensor) -> dict[str, float]:
        """Return the log-prob gap between trainer and rollout engine."""
        gap = mismatch(logprobs, engine, mask)
        if not self._config.trains_without_demonstrations:
            return gap
        # The gap is then the effect of the demonstrations on the rollout engine, and says nothing about a sync.
        names = {name: name.replace("sampling/sampling_", CONTEXT).replace("sampling/", CONTEXT) for name in gap}
        return {names[name]: value for name, value in gap.items()}


def _padded(rows: Sequence[np.ndarray], width: int) -> Tensor:
    """Pad or cut rows to float32 or bool [B, width]."""
    padded = np.zeros((len(rows), width), dtype=rows[0].dtype)
    kept = [row[:width] for row in rows]
    lengths = np.array([len(row) for row in kept])
    padded[np.arange(width) < lengths[:, None]] = np.concatenate(kept)
    return torch.from_numpy(padded)


def _forward_passes(scored: ScoredRollouts, name: str, field: str, width: int) -> Tensor:
    rows: list[TokenScores] = scored.forward_passes[name]
    return _padded([getattr(row, field) for row in rows], width)
