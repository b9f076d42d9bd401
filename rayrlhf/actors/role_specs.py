"""Specs that each role's actors are built from, taken from the configuration."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rayrlhf.actors.placement import FrozenRole, ResourcePlan, Role, TrainRole, Transfer, serves_adapters, weight_transfer
from rayrlhf.config.judge import JudgeSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.train import SharePrefixes
from rayrlhf.engines.rollout.common import ReplicaNode, RolloutSpec, rollout_environment
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.models.network_io import Head


class JudgeSpec(NamedTuple):
    """The judge, the seed of its completions, and `reward.probe`."""

    section: JudgeSection
    seed: int
    probe: bool


class ReferenceSpec(NamedTuple):
    """Reference or teacher model, and how it computes.

    Attributes:
        batch_tokens: tokens per forward pass.
        offload: keep its weights in CPU memory.
        share_prefixes: `train.share_prefixes`.
        vocabulary: most likely tokens that a teacher returns; None for log-probs of the sampled ones alone.
    """

    model: ModelSection
    batch_tokens: int
    offload: bool
    share_prefixes: SharePrefixes
    vocabulary: int | None = None


@dataclass(frozen=True, slots=True)
class RoleSpecs:
    """Specs of all roles of one run."""

    config: PPOConfig
    plan: ResourcePlan

    def environment(self, role: Role) -> dict[str, str]:
        """Return the environment variables a role's processes start with."""
        worker = self.plan.workers[role][0]
        if role == "rollout":
            return rollout_environment(self.config.rollout, threads=worker.threads * len(worker.bundles))
        if role == "judge":
            return rollout_environment(self.judge().section.engine, threads=worker.threads)
        return TRAINER_ENVIRONMENT if role in ("policy", "critic", "reference", "teacher") else {}

    def backend(self, role: Role) -> Literal["gloo", "nccl"]:
        """Return the collective backend of a role's process group."""
        return "nccl" if self.plan.workers[role][0].gpus else "gloo"

    @property
    def weight_transfer(self) -> Transfer:
        """Transport of weights; see `rollout.weight_transfer`."""
        return weight_transfer(self.config, self.plan)

    @property
    def serves_adapters(self) -> bool:
        """True if the rollout engine serves adapters unmerged; see `rollout.lora`."""
        return serves_adapters(self.config, self.plan)

    def reward(self) -> tuple[RewardSection, SharePrefixes, ModelSection]:
        """Return the reward functions and models, `train.share_prefixes`, and the policy's model."""
        return self.config.reward, self.config.train.share_prefixes, self.config.model

    def judge(self) -> JudgeSpec:
        """Return the spec of the judge."""
        reward = self.config.reward
        assert reward.judge is not None
        return JudgeSpec(reward.judge, self.config.run.seed, reward.probe)

    def frozen(self, role: FrozenRole) -> ReferenceSpec:
        """Return the spec of the reference model or of the teacher."""
        config, train = self.config, self.config.train
        model, offload, vocabulary = config.reference.model or config.model, config.reference.offload, None
        if role == "teacher" and config.teacher is not None:
            model, offload = config.teacher.model, config.teacher.offload
            vocabulary = config.teacher.divergence.vocabulary if config.teacher.divergence else None
        return ReferenceSpec(model, train.score_batch_tokens, offload, train.share_prefixes, vocabulary)

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
            adapters=self.serves_adapters,
            reference=(config.reference.model or config.model) if config.opponent_share else None,
            node=ReplicaNode(count=len(self.plan.workers["rollout"][0].bundles)),
        )

    def train(self, role: TrainRole) -> TrainEngineSpec:
        """Return the spec of a train engine."""
        return train_spec(self.config, role)


def train_spec(config: PPOConfig, role: TrainRole) -> TrainEngineSpec:
    """Return the spec of a role's train engine."""
    shared = config.critic.kind == "shared"
    policy = role == "policy"
    placement = config.placement.policy if policy else config.placement.critic
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
        role=role,
        parity=config.algorithm.parity,
        sequence_parallel=placement.sequence_parallel,
        tensor_parallel=placement.tensor_parallel,
        expert_parallel=placement.expert_parallel,
        routing_replay=policy and config.rollout.replays_routing,
        router_load=policy,
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
