"""Training sections: batches, optimizer, schedule, sharding."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.rank_groups import RankGroups
from rayrlhf.config.section import Count, Section

DEFAULT_BATCH_SIZE = 32
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moving average."""
SharePrefixes = Literal["auto", "off"]
UNSHARED: Mapping[SharePrefixes, str] = {"auto": "", "off": "train.share_prefixes is off"}
"""Reason why no prefixes are shared, by `train.share_prefixes`."""


class OptimizerSection(Section):
    """The optimizer of one model."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer. `adamw` decouples weight decay from the gradient; `adam` adds it to the gradient."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and second moments of the gradient. No effect on `sgd`."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay per step, multiplied by the learning rate."""


class ScheduleSection(Section):
    """Learning rate over optimizer steps: linear warm-up, then `shape`, down to `floor`."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the learning-rate warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Learning-rate warm-up: optimizer steps in which the rate rises linearly from 0."""
    floor: float = Field(0.0, ge=0, le=1)
    """Final learning rate, as a share of the peak."""


class UpdateSection(Section):
    """Settings of every training: learning rate, micro-batches, optimizer, sharding."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of the schedule."""
    epochs: int = Field(1, ge=1)
    """Passes over the training data; in PPO over the experience of a step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward and backward pass on one rank. Default: set by `micro_batch_tokens`."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Maximum tokens of one forward and backward pass on one rank, padding included; with `packing` the size of a pack. Ranks
    that share rows (`sequence_parallel`) count as one."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum norm of the whole gradient; larger ones are scaled down. null does not clip."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    router_aux_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of a mixture of experts (TRL `router_aux_loss_coef`; 0.001 in the configurations of
    Qwen3-MoE and Mixtral). In PPO the critic trains without it."""
    share_prefixes: SharePrefixes = "auto"
    """Common prefixes of the samples of a batch, in training and in scoring. `auto` computes them once if that saves at least
    3 % of the tokens and 16 tokens per branch; `off` computes each copy. Losses and gradients are equal up to rounding."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, sharding over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer states in main memory. Needs `zero_stage` 1, 2 or 3."""

    @property
    def sharded(self) -> bool:
        """True if ranks share training state, so that each holds only a part."""
        return self.zero_stage > 0

    @property
    def all_ranks_must_forward(self) -> bool:
        """True if parameters are sharded, so that every rank must run the same forward passes."""
        return self.zero_stage == 3

    @property
    def sharding_label(self) -> str:
        """Sharding in words, for plans and logs."""
        return f"ZeRO stage {self.zero_stage}"

    def check_shared_weights(self, key: str, groups: RankGroups) -> None:
        """Check that no setting needs the weights that ranks share.

        Args:
            key: section of the groups, for the message.
            groups: ranks that share weights or experts.

        Raises:
            ValueError: weights are averaged, or ranks that compute the same would add different noise.
        """
        refused = {"ema_decay": "an average is of whole weights"}
        for label in ("expert_parallel", "tensor_parallel"):
            size = getattr(groups, label)
            found = f"{key}.{label} {size} with train."
            if label == "tensor_parallel":
                refused["neftune_alpha"] = "ranks draw different noise"
            for name, reason in refused.items():
                if size > 1 and getattr(self, name, None) is not None:
                    raise ValueError(f"{found}{name}: {reason}; expected null")

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class TrainSection(UpdateSection):
    """Update of one step: `epochs` passes over its experience, in mini-batches."""

    mini_batch_size: int | None = Field(None, ge=1)
    """Samples per optimizer step, over all ranks; must divide the samples of a step. Default: all of them."""
    score_batch_tokens: int = Field(8192, ge=1)
    """Maximum tokens of one forward pass without gradient, padding included."""
    early_stop_kl: float | None = Field(None, gt=0)
    """Stop the updates of a step once the KL from the policy that sampled exceeds 1.5 times this value, in nats per token (TRL
    `target_kl`). Default: never."""
    ratio_guard: float | None = Field(None, gt=1)
    """Set the loss of a mini-batch to zero if its mean ratio exceeds this value (TRL `ratio_threshold`). Default: never."""
    max_nonfinite_steps: int = Field(3, ge=0)
    """Maximum optimizer steps in a row that are skipped because of an inf or NaN; one more stops the run."""

    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay per step of a moving average of the policy's weights. The average is exported to `export-average`, in addition to
    the policy. Default: no average."""

    def sharding_fingerprint(self) -> dict[str, int]:
        """Settings, by key, that two runs must share to load each other's training state."""
        return {"train.zero_stage": self.zero_stage}

    @model_validator(mode="after")
    def _check_ema(self) -> Self:
        if self.ema_decay is not None and self.zero_stage == 3:
            raise ValueError(f"ema_decay {self.ema_decay:g} needs whole weights on a rank: expected zero_stage 0, 1 or 2")
        return self


class TuningTrainSection(UpdateSection):
    """Passes over the data, and size of an optimizer step in samples or tokens.

    For reward models and DPO a sample is a pair.
    """

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of the schedule."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of the run, in place of `epochs`; the data is repeated as needed. Default: set by `epochs`."""
    batch_size: int | None = Field(None, ge=1)
    """Samples per optimizer step, over all workers. Default: 32, unless `batch_tokens` is set."""
    batch_tokens: int | None = Field(None, ge=1)
    """Maximum tokens per optimizer step, over all workers, in place of `batch_size`."""
    packing: bool = False
    """Concatenate samples instead of padding them, without attention between them. Loss and gradients are the same."""

    @property
    def samples_per_step(self) -> int | None:
        """Samples per optimizer step; None with `batch_tokens`."""
        return None if self.batch_tokens is not None else self.batch_size or DEFAULT_BATCH_SIZE

    def engine_section(self) -> TrainSection:
        """Return the train engine's section: one pass per batch, in one optimizer step."""
        return TrainSection(**{name: getattr(self, name) for name in UpdateSection.model_fields if name != "epochs"})

    @model_validator(mode="after")
    def _check_batch_size(self) -> Self:
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens are both given: expected one of them")
        if self.packing and self.micro_batch_size is not None:
            raise ValueError("micro_batch_size has no effect with packing, where micro_batch_tokens is the size of a pack")
        return self


class SupervisedTrainSection(TuningTrainSection):
    """Training of SFT."""

    neftune_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings in training, uniform in +-alpha / sqrt(tokens x width) (Jain et al. 2023). Default: none."""


class DistillationTrainSection(SupervisedTrainSection):
    """Training of a student on its teacher's distributions."""

    vocabulary: Count | Literal["full"] = "full"
    """Compared tokens: `full`, or the teacher's n most likely tokens, with all others as one outcome. On disk a response token
    takes one hidden state with `full`, else 8 n bytes."""


class RewardTrainSection(TuningTrainSection):
    """Training of a reward model."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of the schedule."""
    center_coefficient: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps rewards around 0 (TRL `center_rewards_coefficient`, usually 0.01)."""
    head_init: Literal["normal", "zero", "default"] = "normal"
    """Initialization of a new scalar head: `zero`, `normal` N(0, 1/(hidden+1)), or `default`, torch's own for Linear."""


class DirectPreferenceTrainSection(TuningTrainSection):
    """Training of a policy on pairs (DPO)."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of the schedule."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "kto"] = "sigmoid"
    """Loss of a pair. `sigmoid`: DPO. `robust`: its unbiased form for wrong labels. `hinge`: SLiC. `ipo`: the squared loss of
    mean log-ratios. `apo_zero`, `apo_down`: APO, for chosen answers better or worse than the model's. Without a reference:
    `simpo`, mean log-probs with a margin; `cpo`; `orpo`, the odds ratio. Of single answers with a label: `kto`."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference; tau of IPO; reward scale of CPO and SimPO (2 to 2.5 in SimPO's paper);
    weight of ORPO's odds ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels assumed wrong. With `sigmoid` this is conservative DPO."""
    target_margin: float | None = Field(None, ge=0)
    """SimPO's gamma: the margin by which the reward of the chosen answer should exceed that of the rejected one. Default: 0.5,
    as in TRL 1.16. Only `simpo` reads it."""
    nll_coefficient: float | None = Field(None, ge=0)
    """Weight of the negative log-likelihood of the chosen answers, a mean over their tokens. Default: 1 for `cpo` and `orpo`, 0
    for the others."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of KTO's answers with label true."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of KTO's answers with label false. The paper keeps the weights times the counts of both within 1 to 4/3."""
    reference: Literal["initial", "none"] = "initial"
    """Reference model. `initial`: the initial policy, scored once on all pairs. `none`: no reference. The default of `simpo`,
    `cpo` and `orpo` is `none`."""

    @property
    def has_reference(self) -> bool:
        """True if the loss compares with the initial policy."""
        return self.reference == "initial"

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood of chosen answers."""
        return float(self.loss in ("cpo", "orpo")) if self.nll_coefficient is None else self.nll_coefficient

    @model_validator(mode="after")
    def _check_unread_keys(self) -> Self:
        smoothed = ("sigmoid", "robust", "simpo", "cpo")
        if self.loss not in smoothed and self.label_smoothing:
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g} has no effect on loss {self.loss}; expected {', '.join(smoothed)}"
            )
        if self.loss != "simpo" and self.target_margin is not None:
            raise ValueError(f"target_margin {self.target_margin:g} has no effect on loss {self.loss}; expected simpo")
        free = self.loss in ("simpo", "cpo", "orpo")
        if free and "reference" not in self.model_fields_set:
            # A default that follows another key; a section is frozen from here on.
            object.__setattr__(self, "reference", "none")
        if free and self.reference == "initial":
            raise ValueError(f"reference initial has no effect on loss {self.loss}, which reads none; expected none")
        if self.loss == "kto" and (self.reference == "none" or self.nll_weight):
            raise ValueError("loss kto compares single answers with the initial policy: expected reference initial and no nll")
        if self.loss != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(f"desirable_weight and undesirable_weight have no effect on loss {self.loss}; expected kto")
        return self
