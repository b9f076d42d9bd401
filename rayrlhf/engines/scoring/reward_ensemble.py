"""Reward of several reward models: mean minus `uncertainty` x standard deviation.

A policy finds responses that one reward model overrates by mistake. Models trained separately (other seeds, other data) rarely
share the mistake, so a response loses `uncertainty` standard deviations of its rewards over the members (Coste et al. 2023,
"Reward Model Ensembles Help Mitigate Overoptimization"; they subtract the variance, this keeps the reward's unit). Members need
the same unit, see `normalize`.

All members are in the same process and run one after another, so that every rank can score any response.
"""

from collections.abc import Sequence

import numpy as np

from rayrlhf.config.reward import RewardModelSection
from rayrlhf.config.train import SharePrefixes
from rayrlhf.data.messages import Message
from rayrlhf.data.records import Float32
from rayrlhf.engines.scoring.reward_model import RewardModelEngine
from rayrlhf.errors import AlarmError
from rayrlhf.rewards.functions import MODEL_PART, SPREAD_PART, STEPS_PART
from rayrlhf.rewards.step_rewards import ScoredSteps, step_score


class RewardEnsemble:
    """Reward models of a section, one or several."""

    def __init__(self, section: RewardModelSection, share_prefixes: SharePrefixes = "auto") -> None:
        """Load all members.

        Raises:
            UserError: a member cannot be loaded.
        """
        self._section = section
        members = [section.model_copy(update={"model": model}) for model in section.models]
        self._members = [RewardModelEngine(member, share_prefixes) for member in members]

    @property
    def shares_prefixes(self) -> bool:
        """True if all members compute common beginnings once, where that pays."""
        return all(member.shares_prefixes for member in self._members)

    @property
    def load_check(self) -> str:
        """Outcomes of the members' checks on load, in words."""
        return "; ".join(member.load_check for member in self._members)

    @property
    def weights(self) -> dict[str, float]:
        """Factor of each part in the score."""
        extra = [SPREAD_PART] * (len(self._members) > 1) + [STEPS_PART] * (self._section.steps is not None)
        return {MODEL_PART: self._section.weight} | dict.fromkeys(extra, 0.0)

    def parts(self, prompts: Sequence[str | list[Message]], responses: Sequence[str]) -> dict[str, Float32]:
        """Return the reward of each pair, float32 [B], and diagnostics.

        These are the standard deviation of several members, or the number of steps.

        Raises:
            AlarmError: a reward is inf or NaN; names member and sample.
        """
        return self.parts_with_steps(prompts, responses)[0]

    def parts_with_steps(
        self, prompts: Sequence[str | list[Message]], responses: Sequence[str]
    ) -> tuple[dict[str, Float32], list[ScoredSteps] | None]:
        """Return `parts`, and the steps of each response of a process reward model."""
        section = self._section.steps
        if section is not None:
            steps = self._members[0].score_steps(prompts, responses)
            scores = np.array([step_score(one.probabilities, section.aggregate) for one in steps], dtype=np.float32)
            self._check_finite(scores[None])
            return {MODEL_PART: scores, STEPS_PART: np.array([len(one.ends) for one in steps], dtype=np.float32)}, steps
        values = np.stack([member.score(prompts, responses) for member in self._members])
        self._check_finite(values)
        if len(self._members) == 1:
            return {MODEL_PART: values[0]}, None
        return {MODEL_PART: pessimistic(values, self._section.uncertainty), SPREAD_PART: values.std(0)}, None

    def _check_finite(self, values: Float32) -> None:
        for member, sample in np.argwhere(~np.isfinite(values))[:1]:
            path = self._section.models[member].path
            raise AlarmError(
                f"reward model {path}: reward {values[member, sample]} of sample {sample}, expected a finite number"
            )

    def score(self, prompts: Sequence[str | list[Message]], responses: Sequence[str]) -> Float32:
        """Return the reward of each pair, float32 [B]."""
        return self.parts(prompts, responses)[MODEL_PART]


def pessimistic(values: Float32, coefficient: float) -> Float32:
    """Return mean minus `coefficient` x population standard deviation over the first axis.

    Args:
        values: float32 [M, B].
        coefficient: at least 0.
    """
    doubtful: Float32 = values.mean(0) - np.float32(coefficient) * values.std(0)
    return doubtful
