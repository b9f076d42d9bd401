"""Actors of frozen models: rewards, a judge's verdicts, and log-probs of reference and teacher."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.worker import ModelCheck, Worker, check_assigned_gpu, returns_memory
from rayrlhf.config.judge import JudgeSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.train import SharePrefixes
from rayrlhf.data.fingerprints import reward_seal
from rayrlhf.data.records import Prompt, Records, Rollout, TokenScores, TokenSequence
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.scoring.judge_engine import JudgeEngine
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import load_tokenizer
from rayrlhf.models.network_io import OutputName
from rayrlhf.rewards.functions import JUDGE_PART, MODEL_PART, BoundFunction, ScoringBatch, load_functions
from rayrlhf.rewards.memory_limit import memory_limit
from rayrlhf.rewards.score import RewardBatch, run_functions, weighted_sum
from rayrlhf.rewards.step_rewards import paid_at_tokens


class RewardActor(Worker):
    """One copy of the reward; ranks split the rollouts between them."""

    _section: RewardSection
    _functions: list[BoundFunction]
    _model: RewardEnsemble | None
    _policy_tokenizer: Tokenizer | None

    @measured
    @returns_memory
    def build(self, section: RewardSection, share_prefixes: SharePrefixes, policy: ModelSection | None = None) -> None:
        """Resolve the functions and load the models.

        Rewards of steps are paid at tokens of `policy`'s tokenizer, and with None at the end of the response.
        """
        check_assigned_gpu()
        self._section = section
        self._functions = load_functions(section)
        self._model = RewardEnsemble(section.model, share_prefixes) if section.model else None
        self._policy_tokenizer = load_tokenizer(policy) if policy is not None and section.pays_steps else None

    def load_check(self) -> ModelCheck:
        """See `Worker.load_check`."""
        return ModelCheck(self._model.load_check, self._model.shares_prefixes) if self._model else ModelCheck()

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
            found, steps = self._model.parts_with_steps(batch.whole_prompts, batch.responses)
            parts |= found
            weights |= self._model.weights
            if steps is not None and self._policy_tokenizer is not None and self._section.model and self._section.model.steps:
                pay = partial(paid_at_tokens, aggregate=self._section.model.steps.aggregate, tokenizer=self._policy_tokenizer)
                tokens[MODEL_PART] = [pay(one, rollout=rollout) for one, rollout in zip(steps, rollouts, strict=True)]
        return _sealed(weighted_sum(parts, weights, tokens, complete=self._section.judge is None), rollouts)


class JudgeActor(Worker):
    """One replica of the judge; ranks split the rollouts between them."""

    PRELOADED = RolloutActor.PRELOADED

    _engine: JudgeEngine
    _weight: float

    @measured
    def build(self, section: JudgeSection, seed: int, probe: bool) -> None:
        """Start the engine, and try it out on made-up responses."""
        check_assigned_gpu()
        self._weight = section.weight
        self._engine = JudgeEngine(section, seed)
        if probe:
            self._engine.try_out()

    @measured
    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> RewardBatch:
        """Judge rollouts, one prompt per rollout; without a score the part is NaN.

        Raises:
            UserError: see `JudgeEngine.parts`.
        """
        groups = [rollout.key.prompt for rollout in rollouts]
        parts = self._engine.parts(ScoringBatch.of_rollouts(prompts, rollouts), groups)
        weights = dict.fromkeys(parts, 0.0) | {JUDGE_PART: self._weight}
        return _sealed(weighted_sum(parts, weights, complete=False), rollouts)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def __ray_shutdown__(self) -> None:
        """Free the engine when Ray shuts the actor down."""
        if hasattr(self, "_engine"):
            self._engine.close()


def _sealed(rewards: RewardBatch, rollouts: Sequence[Rollout]) -> RewardBatch:
    """Return rewards that are bound to their samples."""
    shares = rewards.tokens or [None] * len(rollouts)
    rows = zip(rollouts, rewards.scores.tolist(), shares, strict=True)
    return replace(rewards, seals=[reward_seal(*row) for row in rows])


class ReferenceActor(Worker):
    """One copy of the reference or the teacher; ranks split the sequences between them."""

    _engine: FrozenEngine

    @measured
    @returns_memory
    def build(
        self,
        model: ModelSection,
        batch_tokens: int,
        offload: bool,
        share_prefixes: SharePrefixes,
        vocabulary: int | None = None,
    ) -> None:
        """Load the model."""
        check_assigned_gpu()
        self._engine = FrozenEngine(model, batch_tokens, offload=offload, share_prefixes=share_prefixes, vocabulary=vocabulary)

    def load_check(self) -> ModelCheck:
        """See `Worker.load_check`."""
        return ModelCheck(self._engine.load_check, self._engine.shares_prefixes)

    @measured
    @returns_memory
    def score(
        self, sequences: Sequence[TokenSequence], outputs: frozenset[OutputName], temperature: float, reference: bool
    ) -> list[TokenScores]:
        """Score this rank's share of the sequences."""
        return Records(self._engine.score(sequences, outputs, temperature=temperature, reference=reference))
