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

from rayrlhf.algorithms.advantages import advantage_method, estimate_advantages, has_contrast
from rayrlhf.algorithms.distillation import teacher_advantages
from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.importance import (
    REJECTION_BOUNDS,
    accepted_responses,
    importance_weights,
    mismatch,
    weight_statistics,
)
from rayrlhf.algorithms.kl import kl_controller, kl_penalty
from rayrlhf.algorithms.masking import masked_mean, whiten, zero_masked
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
from rayrlhf.data.records import Records, Rollout, SampleKey
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.train.supervised_batches import IDS, LOGPROBS
from rayrlhf.environments.episodes import sample_numbers, sample_votes, turn_weight
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.loss_arrays import loss_arrays
from rayrlhf.ppo.opponent import own_rows
from rayrlhf.ppo.scoring import ScoredRollouts, padded_rows
from rayrlhf.rewards.functions import JUDGE_PART, MODEL_PART

MIN_LOG_Z = -0.05
"""Least log-probability, in nats, that a constraint leaves at a token that is trained."""
CONTEXT = "context/"
"""Prefix of the same metrics where the rollout engine reads demonstrations that the trainer does not."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One step's experience.

    Attributes:
        batch: sequences and the arrays that the objectives read.
        keys: sample of each row.
        kl: float [B], nats per sequence; zeros without a reference.
        metrics: statistics of the step before its update, with TRL's names.
        scores: float [B], after shaping.
    """

    batch: TrainingBatch
    keys: list[SampleKey]
    kl: Tensor
    metrics: dict[str, float]
    scores: Tensor

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def learnable(self) -> list[int]:
        """Rows of the batch with tokens to train on."""
        return [int(row) for row in np.flatnonzero(self.batch.arrays["action_mask"].any(1))]

    @property
    def learnable_groups(self) -> list[list[int]]:
        """The same rows by prompt, in the order of their first rows."""
        groups: dict[int, list[int]] = {}
        for row in self.learnable:
            groups.setdefault(self.keys[row].prompt, []).append(row)
        return list(groups.values())


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
        algorithm, rollouts = self._config.algorithm, scored.rollouts
        width = self._width(rollouts)
        mask = padded_rows([rollout.action_mask for rollout in rollouts], width).bool()
        engine = padded_rows([rollout.logprobs for rollout in rollouts], width)
        recomputed = self._config.old_logprobs == "recomputed"
        logprobs = scored.table("policy", "logprobs", width) if recomputed else engine
        scores = self._shape(scored)
        free = mask & ~self._bent(rollouts, logprobs, engine, width)
        kl = self._kl(scored, logprobs, free | ~mask)
        in_reward = kl if algorithm.kl.placement == "reward" else None
        coefficient = self._controller.value
        at_end, by_token = self._credited(scores, scored, width)
        earned = token_rewards(
            in_reward, at_end, mask, coefficient, position=algorithm.shaping.score_position, token_scores=by_token
        )
        rewards = earned.rewards
        if algorithm.shaping.whiten_rewards:
            rewards = whiten(rewards, earned.value_mask, shift_mean=False)
        values = self._values(scored, width)
        cause = self._nonfinite(scored, logprobs, values, by_token, mask, earned.value_mask)
        groups = torch.tensor([rollout.key.prompt for rollout in rollouts])
        compared = (self._baselines(scored), self._votes(rollouts), *self._parts(scored), self._samples(rollouts))
        inputs = AdvantageInputs(rewards, scores, groups, mask, earned.value_mask, values, *compared)
        result = self._estimate(inputs, rollouts[0].key.step)
        advantages, taught, teacher_metrics = self._taught(result.advantages, logprobs, scored, mask)
        weights, weight_metrics, accepted = self._corrected(logprobs, engine, free)
        kept = self._kept(rollouts)[:, None] & accepted
        arrays = {"advantages": advantages, "action_mask": free & kept}
        if self._config.old_logprobs != "skipped":
            arrays["old_logprobs"] = logprobs
        if values is not None and result.returns is not None:
            arrays |= {"old_values": values, "returns": result.returns, "value_mask": earned.value_mask & kept}
        if algorithm.policy_loss.kind == "plugin" or not recomputed:
            arrays["rollout_logprobs"] = engine
        if "reference" in scored.forward_passes:
            arrays["ref_logprobs"] = scored.table("reference", "logprobs", width)
        arrays |= loss_arrays(self._config, scored, advantages, logprobs, arrays["action_mask"])
        batch = TrainingBatch(
            Records(rollout.sequence() for rollout in rollouts),
            {k: v.numpy() for k, v in (arrays | weights | taught).items()},
            cause=cause if _spread(advantages, arrays["action_mask"]) else "",
        )
        metrics = self._metrics(rollouts, logprobs, kl, earned.non_score, scores, mask) | weight_metrics | teacher_metrics
        if recomputed and free.any():
            metrics |= self._gap(logprobs, engine, free & torch.from_numpy(own_rows(self._config, rollouts))[:, None])
        if self._config.rollout.samples_per_prompt > 1:
            metrics["frac_reward_zero_std"] = 1 - has_contrast(scores, groups).float().mean().item()
        if values is not None and result.returns is not None:
            metrics |= value_statistics(values, result.returns, earned.value_mask)
        sequence_kl = torch.zeros(len(rollouts)) if kl is None else torch.where(mask, kl, torch.zeros_like(kl)).sum(1)
        self._controller.update(float(sequence_kl.mean()), len(rollouts))
        metrics["objective/kl_coef"] = coefficient
        return Experience(batch, [rollout.key for rollout in rollouts], sequence_kl, metrics, scores)

    def _bent(self, rollouts: Sequence[Rollout], logprobs: Tensor, engine: Tensor, width: int) -> Tensor:
        """Mask the tokens whose distribution a constraint changed, bool [B, T].

        A token is then sampled from p(a) / Z, with Z the probability of all allowed tokens, and the gradient of log p lacks
        that of log Z. Z is the same for each token that could have been drawn, so leaving tokens out by Z adds no bias.
        """
        none = np.zeros(0, np.bool_)
        constrained = padded_rows([none if one.constrained is None else one.constrained for one in rollouts], width)
        known = self._config.old_logprobs == "recomputed"
        return constrained & (logprobs - engine < MIN_LOG_Z) if known else constrained

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"controller": self._controller.state_dict(), "moments": self._moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state."""
        self._controller.load_state_dict(state["controller"])
        self._moments.load_state_dict(state["moments"])

    def _kl(self, scored: ScoredRollouts, logprobs: Tensor, counted: Tensor) -> Tensor | None:
        """Return the KL penalty of counted tokens, float [B, T]; None without a reference."""
        if "reference" not in scored.forward_passes:
            return None
        section = self._config.algorithm.kl
        reference = scored.table("reference", "logprobs", logprobs.shape[1])
        kl = kl_penalty(logprobs, reference, section.estimator, section.arguments)
        return torch.where(counted, kl, torch.zeros_like(kl))

    def _width(self, rollouts: Sequence[Rollout]) -> int:
        longest = max(len(rollout.response_ids) for rollout in rollouts)
        return slot_count(longest, self._config.rollout.max_new_tokens, self._config.algorithm.shaping.score_position)

    def _nonfinite(
        self,
        scored: ScoredRollouts,
        logprobs: Tensor,
        values: Tensor | None,
        by_token: Tensor | None,
        mask: Tensor,
        value_mask: Tensor,
    ) -> str:
        """Name sample, token and role of the first non-finite input."""
        sampler = "policy" if self._config.old_logprobs == "recomputed" else "rollout engine"
        owner = "policy" if self._config.critic.kind == "shared" else "critic"
        read = [(f"log-prob of the {sampler}", logprobs, mask)]
        for role in ("reference", "teacher"):
            if role in scored.forward_passes:
                read.append((f"log-prob of the {role}", scored.table(role, "logprobs", mask.shape[1]), mask))
        if values is not None:
            read.append((f"value of the {owner}", values, value_mask))
        if by_token is not None:
            read.append(("reward of the token", by_token, mask))
        for name, table, under in read:
            for row, token in (~table.isfinite() & under).nonzero().tolist():
                return f"{_described(scored, row)}, token {token}, {name}"
        return ""

    def _estimate(self, inputs: AdvantageInputs, step: int) -> Advantages:
        section = self._config.algorithm.advantage
        return estimate_advantages(
            section.estimator,
            inputs,
            gamma=section.gamma,
            lam=section.lam,
            skip_masked=section.skip_masked,
            whitened=section.whiten,
            arguments=section.estimator_arguments(pretraining=step < self._config.critic.pretrain_steps),
        )

    def _taught(
        self, advantages: Tensor, logprobs: Tensor, scored: ScoredRollouts, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the advantages with a teacher's part, arrays for its divergence, and metrics."""
        section = self._config.teacher
        if section is None:
            return advantages, {}, {}
        known = scored.table("teacher", "logprobs", mask.shape[1])
        gap = zero_masked(logprobs - known, mask)
        metrics = {
            "objective/teacher_kl": gap.sum(1).mean().item(),
            "objective/teacher_kl_per_token": masked_mean(gap, mask).item(),
        }
        if section.divergence is not None:
            return advantages, {name: scored.table("teacher", name, mask.shape[1]) for name in (IDS, LOGPROBS)}, metrics
        part = teacher_advantages(logprobs, known, mask, discount=section.discount, clip=section.clip)
        return advantages + section.coefficient * part, {}, metrics

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
            parts.append(weight * padded_rows(paid, width))
        if scored.rewards.tokens is not None:
            rows = zip(scored.rewards.tokens, scored.rollouts, strict=True)
            filled = [np.zeros(len(rollout.response_ids), np.float32) if row is None else row for row, rollout in rows]
            parts.append(padded_rows(filled, width))
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
        """Return the scores with the penalties for length and a missing stop token, float [B].

        Raises:
            AlarmError: a score is inf or NaN, which the running moments would keep.
        """
        scores, rollouts = torch.from_numpy(scored.rewards.scores), scored.rollouts
        for row in (~scores.isfinite()).nonzero().flatten().tolist()[:1]:
            raise AlarmError(f"reward: {float(scores[row])} for {_described(scored, row)}, expected a finite number")
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

    def _corrected(self, logprobs: Tensor, engine: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
        """Return importance weights, if any, their metrics, and the accepted responses, bool [B, 1]."""
        section, accepted = self._config.algorithm.off_policy_correction, torch.ones(len(mask), dtype=torch.bool)
        if not section.enabled or not mask.any():
            return {"importance_weights": mask.float()} if section.enabled else {}, {}, accepted[:, None]
        weights, metrics = mask.float(), {}
        if section.level != "none":
            weigh = partial(importance_weights, logprobs, engine, mask, level=section.level)
            weights = weigh(mode=section.mode, low=section.low, high=section.high)
            metrics = weight_statistics(weights, weigh(low=0.0, high=math.inf), mask)
        if section.rejection != "none":
            low, high = REJECTION_BOUNDS[section.rejection]
            low = low if section.rejection_low is None else section.rejection_low
            high = high if section.rejection_high is None else section.rejection_high
            accepted = accepted_responses(logprobs, engine, mask, rejection=section.rejection, low=low, high=high)
            metrics["sampling/responses_rejected"] = 1 - accepted.float().mean().item()
        return {"importance_weights": weights}, metrics, accepted[:, None]

    def _votes(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        environment = self._config.environment
        return torch.from_numpy(sample_votes(rollouts)) if environment and environment.votes == "sample" else None

    def _samples(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.from_numpy(sample_numbers(rollouts))

    def _parts(self, scored: ScoredRollouts) -> tuple[Tensor | None, Tensor | None]:
        """Return each reward's values [B, K] and their weights [K], if they are read."""
        if not advantage_method(self._config.algorithm.advantage.estimator).parts:
            return None, None
        reward, parts = self._config.reward, scored.rewards.parts
        given = [function.weight for function in reward.functions]
        weights = dict(zip(reward.function_names, given, strict=True))
        if reward.model is not None:
            weights[MODEL_PART] = reward.model.weight
        if reward.judge is not None:
            weights[JUDGE_PART] = reward.judge.weight
        values = [torch.from_numpy(parts[name]) for name in weights]
        return torch.stack(values, 1), torch.tensor(list(weights.values()), dtype=torch.float64)

    def _values(self, scored: ScoredRollouts, width: int) -> Tensor | None:
        if self._config.critic.kind == "none":
            return None
        owner = "policy" if self._config.critic.kind == "shared" else "critic"
        return scored.table(owner, "values", width)

    def _metrics(
        self,
        rollouts: Sequence[Rollout],
        logprobs: Tensor,
        kl: Tensor | None,
        non_score: Tensor,
        scores: Tensor,
        mask: Tensor,
    ) -> dict[str, float]:
        own = torch.from_numpy(own_rows(self._config, rollouts))
        rollouts, kl = [rollouts[row] for row in own.nonzero().flatten()], None if kl is None else kl[own]
        queries = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
        responses = torch.tensor([int(rollout.action_mask.sum()) for rollout in rollouts])
        stopped = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])
        objective = objective_statistics(logprobs[own], kl, non_score[own], scores[own], mask[own])
        return objective | length_statistics(queries, responses, stopped)

    def _gap(self, logprobs: Tensor, engine: Tensor, mask: Tensor) -> dict[str, float]:
        """Return the log-prob gap between trainer and rollout engine."""
        gap = mismatch(logprobs, engine, mask)
        if not self._config.trains_without_demonstrations:
            return gap
        # The gap is then the effect of the demonstrations on the rollout engine, and says nothing about a sync.
        names = {name: name.replace("sampling/sampling_", CONTEXT).replace("sampling/", CONTEXT) for name in gap}
        return {names[name]: value for name, value in gap.items()}


def _described(scored: ScoredRollouts, row: int) -> str:
    return f"sample {row} (prompt {scored.rollouts[row].key.prompt}, sample {scored.rollouts[row].key.sample})"


def _spread(advantages: Tensor, trained: Tensor) -> bool:
    """Return True if non-finite advantages are in more than one row."""
    return int((~advantages.isfinite() & trained).any(1).sum()) > 1
