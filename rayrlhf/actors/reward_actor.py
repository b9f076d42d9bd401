"""Actor of the reward: functions and reward models.

Torch is imported only for a model. Functions do not need it, and their process then starts in a third of the time.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rayrlhf.actors.actor_metrics import measured
from rayrlhf.actors.worker import ModelCheck, Worker, check_assigned_gpu, returns_memory
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.train import SharePrefixes
from rayrlhf.data.records import Prompt, Rollout
from rayrlhf.rewards.functions import MODEL_PART, BoundFunction, ScoringBatch, load_functions
from rayrlhf.rewards.memory_limit import memory_limit
from rayrlhf.rewards.score import RewardBatch, run_functions, sealed, weighted_sum
from rayrlhf.rewards.step_rewards import paid_at_tokens

if TYPE_CHECKING:
    from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
    from rayrlhf.library_types import Tokenizer


class RewardActor(Worker):
    """One copy of the reward; ranks split the rollouts between them."""

    _section: RewardSection
    _functions: list[BoundFunction]
    _model: "RewardEnsemble | None"
    _policy_tokenizer: "Tokenizer | None"

    @measured
    @returns_memory
    def build(self, section: RewardSection, share_prefixes: SharePrefixes, policy: ModelSection | None = None) -> None:
        """Resolve the functions and load the models.

        Rewards of steps are paid at tokens of `policy`'s tokenizer, and with None at the end of the response.
        """
        check_assigned_gpu()
        self._section = section
        self._functions = load_functions(section)
        self._model, self._policy_tokenizer = None, None
        if section.model:
            from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
            from rayrlhf.models.load import load_tokenizer

            self._model = RewardEnsemble(section.model, share_prefixes)
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
        return sealed(weighted_sum(parts, weights, tokens, complete=self._section.judge is None), rollouts)
