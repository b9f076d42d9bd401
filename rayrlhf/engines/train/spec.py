"""What a train engine is built from: small, picklable, equal on every rank."""

from dataclasses import dataclass, field

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.models.network import Head
from rayrlhf.models.value_head import HeadInit


@dataclass(frozen=True, slots=True)
class TrainEngineSpec:
    """Everything an engine is built from; equal on every rank.

    Attributes:
        model: where the weights start, and their adapters.
        heads: {"lm"} a policy, {"lm", "value"} a policy with the critic on its trunk, {"value"} a separate critic.
        head_init: how a value head is filled that the checkpoint does not hold.
        train: batches, optimizer, schedule, sharding.
        learning_rate: peak learning rate of this model.
        total_optimizer_steps: of the whole run, for the schedule.
        seed: of adapters and heads.
        parity: quirks of TRL to reproduce.
        packing: lay the samples of a micro-batch end to end instead of padding them.
        targets_only: compute no logits behind the masks. Log-probs then differ from those of `score` in their last bits, so
            this is not for PPO, where a ratio must be exactly 1.
        head_bias: whether a new value head has a bias.
        noise_alpha: NEFTune's noise on the embeddings in updates; none when None.
    """

    model: ModelSection
    heads: frozenset[Head]
    train: TrainSection
    learning_rate: float
    head_init: HeadInit = "zero"
    total_optimizer_steps: int = 1
    seed: int = 0
    parity: ParitySection = field(default_factory=ParitySection)
    packing: bool = False
    targets_only: bool = False
    head_bias: bool = True
    noise_alpha: float | None = None
