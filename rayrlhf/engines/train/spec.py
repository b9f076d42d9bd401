"""Settings of a train engine."""

from dataclasses import dataclass, field

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.models.network import Head
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
        parity: quirks of TRL to reproduce.
        packing: concatenate the samples of a micro-batch instead of padding them.
        targets_only: compute logits only at the masks. Log-probs then differ from those of `score` in their last bits, so
            this is not for PPO, whose first ratio must be exactly 1.
        head_bias: a new value head has a bias.
        noise_alpha: strength of NEFTune noise on the embeddings in updates; None adds none.
        sequence_parallel: consecutive ranks that share each row; divides the ranks.
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
    parity: ParitySection = field(default_factory=ParitySection)
    packing: bool = False
    targets_only: bool = False
    head_bias: bool = True
    noise_alpha: float | None = None
    sequence_parallel: int = 1
    backend: str = "deepspeed"
