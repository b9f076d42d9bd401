"""The maths of the update: KL, reward shaping, advantages, losses. Names and formulas are those of `rayrlhf.algorithms`."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

KlEstimator = Literal["k1", "abs", "k2", "k3"]
"""The KL over the whole vocabulary (`rayrlhf.algorithms.kl.full_kl`) needs both models' logits, which the driver never sees."""


class KlSection(Section):
    """The penalty for moving away from the reference."""

    estimator: KlEstimator = "k1"
    """`k1` is the log-ratio, `abs` its size, `k2` half its square, `k3` the unbiased one that is never negative."""
    placement: Literal["reward", "loss"] = "reward"
    """Subtract it from the token rewards (PPO), or add it to the loss (GRPO)."""
    coefficient: float = Field(0.05, ge=0)
    """0 means no reference model is started."""
    target: float | None = Field(None, gt=0)
    """Nats per sequence that the adaptive controller steers to (Ziegler et al. 2019); fixed coefficient when not given."""
    horizon: int = Field(10_000, ge=1)
    """Samples over which the adaptive coefficient corrects itself; a larger one reacts more slowly."""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target is not None and self.coefficient == 0:
            raise ValueError("target adapts the coefficient by factors, so a coefficient of 0 would stay 0: give one above 0")
        if self.target is not None and self.placement == "loss":
            raise ValueError("target adapts the coefficient of the reward; with placement 'loss' it is fixed: remove target")
        return self


class ShapingSection(Section):
    """What happens to a sequence's score before it becomes token rewards, in this order."""

    overlong_buffer: int | None = Field(None, ge=1)
    """Tokens before `rollout.max_new_tokens` in which length costs, up to `overlong_penalty` at the limit (DAPO)."""
    overlong_penalty: float = Field(1.0, gt=0)
    """What a response of the full length pays, in units of the score."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a response that did not stop by itself."""
    scale: bool = False
    """Divide by the running standard deviation of all scores so far."""
    center: bool = False
    """Subtract the running mean before scaling."""
    clip: float | None = Field(None, gt=0)
    """Clip the score to [-clip, clip]."""
    whiten_rewards: bool = False
    """Whiten the token rewards of the step, keeping their mean."""
    score_position: Literal["last", "after_last"] = "last"
    """The token that receives the score: the last one (classic), or the slot after a stop token (TRL modern)."""
    truncated: Literal["keep", "mask"] = "keep"
    """`mask`: nothing is learned from the tokens of a response that the length limit cut off; its score still counts in its
    group and in whitening."""


class AdvantageSection(Section):
    """From token rewards and values to advantages and returns."""

    estimator: str = "gae"
    """A name in `rayrlhf.algorithms.advantages.ADVANTAGE_ESTIMATORS`; all but gae do without a critic."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token; of no use to grpo, dr_grpo and rloo, which give a response one advantage."""
    lam: float = Field(0.95, ge=0, le=1)
    """Between one-step differences (0) and whole returns (1), Schulman et al. 2016; only gae has a use for it."""
    whiten: bool | None = None
    """Shift and scale advantages to mean 0 and variance 1 over all samples of the step. When not given, gae, reinforce++ and
    reinforce++-baseline do and the others do not."""
    skip_masked: bool = True
    """Bootstrap across tool or environment tokens; false treats them as steps of value 0 (TRL classic)."""


class PolicyLossSection(Section):
    """The surrogate that the policy minimizes."""

    renamed_keys: ClassVar = {"normalisation": "loss_aggregation", "normalisation_length": "loss_aggregation_length"}

    name: str = "ppo"
    """A name in `rayrlhf.algorithms.policy_losses.POLICY_LOSSES`."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]. gspo needs far less, such as 3e-4; cispo has no lower bound."""
    clip_high: float = Field(0.2, gt=0)
    """Above `clip_low` it is DAPO's clip-higher (0.28). The weight of cispo is bounded by 1 + this, for which 5 is usual."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of a token with a negative advantage, in multiples of it (Ye et al. 2020)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the mean entropy per token, which is subtracted from the loss whatever its loss_aggregation."""
    loss_aggregation: Literal["token", "sequence", "constant"] | None = None
    """Divide an optimizer step's sum by its tokens; or each response by its length and then by the number of responses; or by
    the number of responses times `loss_aggregation_length` (Dr. GRPO). Default: `sequence` for gspo, else `token`."""
    loss_aggregation_length: int | None = Field(None, ge=1)
    """Tokens that `constant` divides a response by; `rollout.max_new_tokens` when not given."""

    @model_validator(mode="after")
    def _check_unused_keys(self) -> Self:
        if self.name == "cispo" and self.dual_clip is not None:
            raise ValueError("dual_clip is of no use with name 'cispo', whose weight is bounded by clip_high: remove it")
        if self.loss_aggregation_length is not None and self.loss_aggregation != "constant":
            raise ValueError("loss_aggregation_length is of no use without loss_aggregation 'constant': remove it, or set that")
        return self


class OffPolicyCorrectionSection(Section):
    """Weights for the gap between the sampler's log-probs and the trainer's (`rayrlhf.algorithms.importance`).

    Off by default: in float32 the gap is about 5e-6 nats. In bfloat16 it is about 0.03, and `level: token` is a good start.
    """

    level: Literal["none", "token", "sequence"] = "none"
    """Weigh each token by its own ratio, or all tokens of a response by the product of their ratios."""
    mode: Literal["truncate", "mask"] = "truncate"
    """What becomes of a weight outside [low, high]: the bound, or 0."""
    low: float = Field(0.0, ge=0, le=1)
    """Smallest weight that is let through."""
    high: float = Field(3.0, ge=1)
    """Largest weight that is let through."""


class ValueLossSection(Section):
    """The clipped squared error of the critic."""

    coefficient: float = Field(0.1, ge=0)
    """Weight beside the policy loss; it matters where both share a trunk."""
    clip: float | None = Field(0.2, gt=0)
    """Keep new values within this distance of the old ones; not clipped when null."""


class ParitySection(Section):
    """Quirks of TRL's trainers, off by default; switch one on only to compare numbers with TRL."""

    mini_batch_means: bool = False
    """Normalise each micro-batch by its own token count instead of the optimizer step's (both TRL lines)."""
    clip_first_step_only: bool = False
    """Clip gradients on the first optimizer step of a run and never again (TRL classic)."""
    no_accumulation: bool = False
    """Step the optimizer after every micro-batch but still divide by their number (TRL's last data batch)."""


class AlgorithmSection(Section):
    """Everything about the objective."""

    renamed_keys: ClassVar = {"correction": "off_policy_correction"}

    kl: KlSection = KlSection()
    shaping: ShapingSection = ShapingSection()
    advantage: AdvantageSection = AdvantageSection()
    policy_loss: PolicyLossSection = PolicyLossSection()
    off_policy_correction: OffPolicyCorrectionSection = OffPolicyCorrectionSection()
    value_loss: ValueLossSection = ValueLossSection()
    parity: ParitySection = ParitySection()
