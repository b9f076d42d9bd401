"""Specs that each role's actors are built from, taken from the configuration."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rayrlhf.actors.placement import ResourcePlan, Role, TrainRole, Transfer, weight_transfer
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.reward import RewardSection
from rayrlhf.engines.rollout.common import RolloutSpec, rollout_environment
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network import Head


class ReferenceSpec(NamedTuple):
    """Reference model, tokens per forward pass, and whether its weights are kept in CPU memory."""

    model: ModelSection
    batch_tokens: int
    offload: bool


@dataclass(frozen=True, slots=True)
class RoleSpecs:
    """Specs of all roles of one run."""

    config: PPOConfig
    plan: ResourcePlan

    def environment(self, role: Role) -> dict[str, str]:
        """Return the environment variables a role's processes start with."""
        worker = self.plan.workers[role][0]
        if role == "rollout":
            return rollout_environment(self.config.rollout, threads=worker.threads)
        return TRAINER_ENVIRONMENT if role in ("policy", "critic", "reference") else {}

    def backend(self, role: Role) -> Literal["gloo", "nccl"]:
        """Return the collective backend of a role's process group."""
        return "nccl" if self.plan.workers[role][0].gpus else "gloo"

    @property
    def weight_transfer(self) -> Transfer:
        """Transport of weights; see `rollout.weight_transfer`."""
        return weight_transfer(self.config, self.plan)

    def reward(self) -> RewardSection:
        """Return the reward functions and models."""
        return self.config.reward

    def reference(self) -> ReferenceSpec:
        """Return the spec of the reference model."""
        config = self.config
        return ReferenceSpec(config.reference.model or config.model, config.train.score_batch_tokens, config.reference.offload)

    def rollout(self) -> RolloutSpec:
        """Return the spec of a rollout engine."""
        config = self.config
        lockstep = config.run.determinism == "exact"
        continues = config.asynchronous.max_staleness > 0 and config.asynchronous.on_update == "continue"
        rollout = config.rollout.model_copy(update={"weight_transfer": self.weight_transfer})
        return RolloutSpec(
            config.model,
            rollout,
            config.run.seed,
            config.environment,
            lockstep,
            continues=continues,
            adapters=config.serves_adapters,
        )

    def train(self, role: TrainRole) -> TrainEngineSpec:
        """Return the spec of a train engine."""
        config = self.config
        shared = config.critic.kind == "shared"
        policy = role == "policy"
        heads: frozenset[Head] = frozenset({"lm", "value"} if policy and shared else {"lm"} if policy else {"value"})
        model = config.model if policy else config.critic.model or config.model
        learning_rate = config.train.learning_rate if policy else config.critic.learning_rate or config.train.learning_rate
        return TrainEngineSpec(
            model=model,
            heads=heads,
            head_init=config.critic.head_init,
            train=config.train,
            learning_rate=learning_rate,
            head_learning_rate=config.critic.learning_rate if policy and shared else None,
            total_optimizer_steps=optimizer_steps(config),
            seed=config.run.seed,
            parity=config.algorithm.parity,
            sequence_parallel=(config.placement.policy if policy else config.placement.critic).sequence_parallel,
        )


TRAINER_ENVIRONMENT = {
    # Meant to keep freed activations in the process rather than map them again each step; the gain has not been measured.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def optimizer_steps(config: PPOConfig) -> int:
    """Return the number of optimizer steps of a whole run, for learning-rate schedules."""
    warmup = -(-config.sft_warmup.samples // config.sft_warmup.mini_batch_size) if config.sft_warmup else 0
    return warmup + config.run.steps * config.updates_per_step
