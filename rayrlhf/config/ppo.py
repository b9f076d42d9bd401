"""The root of a PPO configuration file, and the checks that span sections."""

from typing import Self

from pydantic import model_validator

from rayrlhf.config.algorithm import AlgorithmSection
from rayrlhf.config.data import DataSection
from rayrlhf.config.model import CriticSection, ModelSection, ReferenceSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.config.run import (
    CheckpointSection,
    DeadlineSection,
    EvaluationSection,
    ObserveSection,
    PlacementSection,
    RunSection,
)
from rayrlhf.config.section import Section
from rayrlhf.config.train import TrainSection


class PPOConfig(Section):
    """Everything `rayrlhf ppo` needs."""

    run: RunSection = RunSection()
    model: ModelSection
    reference: ReferenceSection = ReferenceSection()
    critic: CriticSection = CriticSection()
    reward: RewardSection
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    placement: PlacementSection = PlacementSection()
    deadlines: DeadlineSection = DeadlineSection()
    observe: ObserveSection = ObserveSection()

    @property
    def samples_per_step(self) -> int:
        """Responses sampled in one step."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def mini_batch_size(self) -> int:
        """Samples in one optimizer step, over all ranks."""
        return self.train.mini_batch_size or self.samples_per_step

    @property
    def needs_reference(self) -> bool:
        """Whether any part of the objective reads reference log-probs."""
        return self.algorithm.kl.coefficient > 0

    @property
    def reference_in_policy(self) -> bool:
        """Whether the policy without its adapters serves as the reference."""
        return self.needs_reference and self.model.lora is not None and self.reference.model is None

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.samples_per_step % self.mini_batch_size:
            raise ValueError(
                f"train.mini_batch_size {self.mini_batch_size} does not divide the {self.samples_per_step} samples of a step "
                "(rollout.prompts_per_step x rollout.samples_per_prompt)"
            )
        if self.mini_batch_size < self.placement.policy.ranks:
            raise ValueError(
                f"train.mini_batch_size {self.mini_batch_size} is smaller than placement.policy.ranks {self.placement.policy.ranks}"
            )
        return self

    @model_validator(mode="after")
    def _critic_fits_the_estimator(self) -> Self:
        if self.algorithm.advantage.estimator == "gae" and self.critic.kind == "none":
            raise ValueError("algorithm.advantage.estimator 'gae' needs a critic: set critic.kind to 'separate' or 'shared'")
        return self
