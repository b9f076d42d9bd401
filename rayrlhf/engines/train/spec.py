"""Settings of a train engine."""

from dataclasses import dataclass, field

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import UNSHARED, TrainSection
from rayrlhf.models.network_io import Head
from rayrlhf.models.value_head import HeadInit


@dataclass(frozen=True, slots=True)
class TrainEngineSpec:
    """Picklable settings of a train engine, equal on every rank.

    Attributes:
        model: initial weights, and their adapters.
        heads: {"lm"} a policy, {"lm", "value"} a policy with the critic on its trunk, {"value"} a separate critic.
        train: batches, optimizer, schedule, sharding.
        learning_rate: peak learning rate of this model.
        head_learning_rate: peak learning rate of a value head; None for that of the model.
        head_init: initialization of a value head that the checkpoint does not hold.
        total_optimizer_steps: of the whole run, for the schedule.
        seed: of adapters and heads.
        role: name of the model in errors.
        parity: quirks of TRL to reproduce.
        packing: concatenate the samples of a micro-batch instead of padding them.
        targets_only: compute logits only at the masks. Log-probs then differ from those of `score` in their last bits, so
            this is not for PPO, whose first ratio must be exactly 1 (with shared prefixes up to rounding,
            1.4e-6 nats in float32).
        head_bias: a new value head has a bias.
        noise_alpha: strength of NEFTune noise on the embeddings in updates; None adds none.
        sequence_parallel: consecutive ranks that share each row; divides the ranks.
        tensor_parallel: consecutive ranks that share each weight; divides the ranks.
        expert_parallel: consecutive ranks that share the experts; divides the ranks.
        routing_replay: force the experts that sequences hold (`rollout.routing_replay`).
        router_load: measure the load of experts, and balance it by `train.router_aux_loss_coefficient`.
        backend: name in `TRAIN_BACKENDS` of `rayrlhf.engines.train.engine`.
    """

    model: ModelSection
    heads: frozenset[Head]
    train: TrainSection
    learning_rate: float
    head_learning_rate: float | None = None
    head_init: HeadInit = "zero"
    total_optimizer_steps: int = 1
    seed: int = 0
    role: str = "policy"
    parity: ParitySection = field(default_factory=ParitySection)
    packing: bool = False
    targets_only: bool = False
    head_bias: bool = True
    noise_alpha: float | None = None
    sequence_parallel: int = 1
    tensor_parallel: int = 1
    expert_parallel: int = 1
    routing_replay: bool = False
    router_load: bool = True
    backend: str = "deepspeed"

    @property
    def caches_frozen_layers(self) -> bool:
        """True if outputs of frozen layers below the adapters are cached."""
        on_last_layers = self.model.lora is not None and self.model.lora.last_layers is not None
        padded = not (self.packing or self.targets_only or self.noise_alpha or self.routing_replay or self.balances_experts)
        return on_last_layers and padded and not self.model.gradient_checkpointing

    @property
    def balances_experts(self) -> bool:
        """True if the loss balances the load of experts."""
        return self.router_load and self.train.router_aux_loss_coefficient > 0

    @property
    def unshared(self) -> str:
        """Reason why these settings share no prefixes; empty where they may be shared."""
        parity = self.parity.mini_batch_means or self.parity.no_accumulation
        reasons = {
            UNSHARED[self.train.share_prefixes]: True,
            "ranks share rows (sequence_parallel)": self.sequence_parallel > 1,
            "samples replay experts of their own (rollout.routing_replay)": self.routing_replay,
            "every sample counts in the load of experts (train.router_aux_loss_coefficient)": self.balances_experts,
            "noise on embeddings differs between samples (train.neftune_alpha)": self.noise_alpha is not None,
            "micro-batches are consecutive samples (algorithm.parity)": parity,
        }
        return next((reason for reason, holds in reasons.items() if reason and holds), "")
