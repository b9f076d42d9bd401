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
from rayrlhf.data.records import Float32
from rayrlhf.engines.scoring.reward_model import RewardModelEngine

MODEL_PART = "reward_model"
"""Name of the reward model's part among those of the functions."""
SPREAD_PART = "reward_model_spread"
"""Name of the part with the standard deviation over the members; it has weight 0."""


class RewardEnsemble:
    """Reward models of a section, one or several."""

    def __init__(self, section: RewardModelSection) -> None:
        """Load all members.

        Raises:
            UserError: a member cannot be loaded.
        """
        self._section = section
        self._members = [RewardModelEngine(section.model_copy(update={"model": model})) for model in section.models]

    @property
    def load_check(self) -> str:
        """Outcomes of the members' checks on load, in words."""
        return "; ".join(member.load_check for member in self._members)

    @property
    def weights(self) -> dict[str, float]:
        """Factor of each part in the score."""
        return {MODEL_PART: self._section.weight} | ({SPREAD_PART: 0.0} if len(self._members) > 1 else {})

    def parts(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Float32]:
        """Return the reward of each pair, float32 [B], and the standard deviation of several members."""
        values = np.stack([member.score(prompts, responses) for member in self._members])
        if len(self._members) == 1:
            return {MODEL_PART: values[0]}
        return {MODEL_PART: pessimistic(values, self._section.uncertainty), SPREAD_PART: values.std(0)}

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float32:
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
