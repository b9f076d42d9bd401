"""Actors of frozen models: rewards of responses, and log-probs of the reference."""

from collections.abc import Sequence

import numpy as np

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.worker import Worker, check_assigned_gpu, returns_memory
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.data.records import Prompt, Records, Rollout, TokenScores, TokenSequence
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.models.network import OutputName
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch, load_functions
from rayrlhf.rewards.memory_limit import memory_limit
from rayrlhf.rewards.score import RewardBatch, run_functions, weighted_sum


class RewardActor(Worker):
    """One copy of the reward; ranks split the rollouts between them."""

    _section: RewardSection
    _functions: list[BoundFunction]
    _model: RewardEnsemble | None

    @measured
    @returns_memory
    def build(self, section: RewardSection) -> None:
        """Resolve the functions and load the models."""
        check_assigned_gpu()
        self._section = section
        self._functions = load_functions(section)
        self._model = RewardEnsemble(section.model) if section.model else None

    def load_check(self) -> str:
        """See `Worker.load_check`."""
        return self._model.load_check if self._model else ""

    @measured
    @returns_memory
    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> RewardBatch:
        """Score rollouts, one prompt per rollout.

        Raises:
            UserError: a function raised, or returned non-finite numbers or too few of them.
        """
        if not rollouts:
            return RewardBatch(np.zeros(0, np.float32), {})
        batch = ScoringBatch.of_rollouts(prompts, rollouts)
        with memory_limit(self._section.memory_gib):
            parts, tokens = run_functions(self._functions, batch, timeout_seconds=self._section.timeout_seconds)
        weights = {function.name: function.weight for function in self._functions}
        if self._model:
            parts |= self._model.parts(batch.prompts, batch.responses)
            weights |= self._model.weights
        return weighted_sum(parts, weights, tokens)


class ReferenceActor(Worker):
    """One copy of the reference; ranks split the sequences between them."""

    _engine: FrozenEngine

    @measured
    @returns_memory
    def build(self, model: ModelSection, batch_tokens: int, offload: bool) -> None:
        """Load the model."""
        check_assigned_gpu()
        self._engine = FrozenEngine(model, batch_tokens, offload=offload)

    def load_check(self) -> str:
        """See `Worker.load_check`."""
        return self._engine.load_check

    @measured
    @returns_memory
    def score(
        self, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> list[TokenScores]:
        """Score this rank's share of the sequences."""
        return Records(self._engine.score(sequences, outputs, temperature=temperature, reference=reference))
