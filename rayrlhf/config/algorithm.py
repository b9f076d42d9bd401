"""Sections of the objective: KL, reward shaping, advantages, losses.

The formulas are in `rayrlhf.algorithms`.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.policy_loss import AnyPolicyLoss, PPOLossSection, check_name
from rayrlhf.config.section import Section

KL_ESTIMATORS = ("k1", "abs", "k2", "k3")
"""Built-in names. The KL over the whole vocabulary needs the logits of both models, which the driver never holds."""


class KlSection(Section):
    """The penalty for moving away from the reference."""

    estimator: str = "k1"
    """KL estimate of a token from d = log p - log p_ref (Schulman 2020): `k1` d, `abs` |d|, `k2` d^2 / 2, `k3` e^-d - 1 + d, or
    a function of your own as `module:function` or `path/to/file.py:function`. k1 and k3 are unbiased; k3 is never negative."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a function of your own."""
    placement: Literal["reward", "loss"] = "reward"
    """`reward` subtracts the penalty from the token rewards (PPO); `loss` adds it to the policy loss (GRPO)."""
    coefficient: float = Field(0.05, ge=0)
    """Weight of the penalty, per nat. 0 starts no reference model. The default is that of TRL 0.12 to 1.12."""
    target: float | None = Field(None, gt=0)
    """Target KL of the adaptive coefficient, in nats per sequence (Ziegler et al. 2019). Default: the coefficient is fixed."""
    horizon: int = Field(10_000, ge=1)
    """Time constant of the adaptive coefficient, in samples. A larger one reacts more slowly. The default is that of TRL
    0.11."""

    @field_validator("estimator")
    @classmethod
    def _check_estimator(cls, name: str) -> str:
        check_name("", name, KL_ESTIMATORS)
        return name

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.arguments and ":" not in self.estimator:
            raise ValueError(f"arguments have no effect with estimator '{self.estimator}': remove them")
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "target adapts the coefficient by factors, so a coefficient of 0 would stay 0: expected one above 0"
            )
        if self.target is not None and self.placement == "loss":
            raise ValueError("target adapts the coefficient of the reward; with placement 'loss' it is fixed: remove target")
        return self


class ShapingSection(Section):
    """Changes to a response's score before it becomes token rewards, in this order."""

    overlong_buffer: int | float | None = Field(None, gt=0)
    """Length of the zone before `rollout.max_new_tokens` in which a response is penalized. The penalty rises linearly to
    `overlong_penalty` at the limit (DAPO, Yu et al. 2025, equation 13). In tokens, or below 1 as a share of
    `rollout.max_new_tokens`. Default: no penalty."""
    overlong_penalty: float = Field(1.0, gt=0)
    """Largest overlong penalty, in units of the score. The default is DAPO's."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Penalty of a response without a stop token, in units of the score. Default: none."""
    scale: bool = False
    """Divide scores by the running standard deviation of all scores of the run."""
    center: bool = False
    """Subtract the running mean of all scores before scaling."""
    clip: float | None = Field(None, gt=0)
    """Clip scores to [-`clip`, `clip`]. Default: not clipped."""
    whiten_rewards: bool = False
    """Scale the token rewards of a step to variance 1 and keep their mean."""
    score_position: Literal["last", "after_last"] = "last"
    """Token that receives the score: the last one (TRL up to 0.11), or the slot after a stop token (TRL 0.12 to 1.12)."""
    truncated: Literal["keep", "mask"] = "keep"
    """Responses that hit the length limit. `keep` trains on them. `mask` excludes their tokens from the losses; their scores
    still count in the group and in whitening (overlong filtering of DAPO)."""

    @field_validator("overlong_buffer")
    @classmethod
    def _check_overlong_buffer(cls, buffer: float | None) -> float | None:
        if buffer is not None and buffer >= 1 and buffer != int(buffer):
            raise ValueError(f"expected a whole number of tokens, or a share below 1, found {buffer:g}")
        return buffer


class AdvantageSection(Section):
    """From token rewards and values to advantages and returns."""

    estimator: str = "gae"
    """Advantage estimator: `gae`, `grpo`, `dr_grpo`, `rloo`, `grpo_leave_one_out`, `opo`, `maxrl`, `gdpo`, `reinforce`,
    `reinforce++`, `reinforce++-baseline`, `remax`, `distillation` (the teacher's log-ratio alone), `pairs` (none, for
    `online_dpo`), or a function or `AdvantageMethod` of your own as `module:name` or `path/to/file.py:name`. Only `gae` needs a
    critic."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of an estimator of your own."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token. No effect on estimators with one advantage per response (grpo, rloo, opo, ...)."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of GAE, from one-step differences (0) to whole returns (1) (Schulman et al. 2016). Only gae reads it."""
    critic_lam: float | None = Field(None, ge=0, le=1)
    """Lambda of the critic's returns (decoupled GAE; 1 in VC-PPO and VAPO). Only for gae. Default: that of the advantages."""
    lam_alpha: float | None = Field(None, gt=0)
    """Length-adaptive lambda of the advantages in place of `lam`: 1 - 1 / (alpha * actions of the response), at least 0 (VAPO:
    0.05). Only for gae. Default: off."""
    whiten: bool | None = None
    """Shift and scale advantages to mean 0 and variance 1 over all samples of the step. Default: true for gae, reinforce++ and
    reinforce++-baseline, false for the others."""
    skip_masked: bool = True
    """Let the recursion of GAE skip tool and environment tokens. `false` treats them as steps of value 0 (TRL up to 0.11)."""

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        for name in ("critic_lam", "lam_alpha"):
            if self.estimator != "gae" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} has no effect with estimator '{self.estimator}': remove it, or set estimator to 'gae'"
                )
        if self.arguments and ":" not in self.estimator:
            raise ValueError(f"arguments have no effect with estimator '{self.estimator}': remove them")
        return self

    def estimator_arguments(self, *, pretraining: bool) -> dict[str, Any]:
        """Return the estimator's own arguments.

        The returns are whole while a critic is pretrained.
        """
        if self.estimator != "gae":
            return self.arguments
        return {"critic_lam": 1.0 if pretraining else self.critic_lam, "lam_alpha": self.lam_alpha}


class OffPolicyCorrectionSection(Section):
    """Importance weights for the log-prob gap between rollout engine and trainer.

    The formulas are in `rayrlhf.algorithms.importance`. In float32 the gap is about 5e-6 nats, so the correction is off by
    default. In bfloat16 it is about 0.03: use `token`.
    """

    level: Literal["none", "token", "sequence"] = "none"
    """Granularity of the weights. `token`: each token's own ratio. `sequence`: the product over the response. Default: `none`,
    or `token` with `async.max_staleness` above 0."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Treatment of weights outside [`low`, `high`]: `truncate` sets them to the bound (TIS), `mask` to 0."""
    low: float = Field(0.0, ge=0, le=1)
    """Lower bound of a weight."""
    high: float = Field(3.0, ge=1)
    """Upper bound of a weight. The default is that of TRL 1.16. IcePop (Ling Team 2025) is `level: token`, `mode: mask`, `low:
    0.5`, `high: 5`."""
    rejection: Literal["none", "geometric", "product", "outlier"] = "none"
    """Rejection of whole responses by a ratio outside [`rejection_low`, `rejection_high`]; none of their tokens is trained on.
    `geometric`: the geometric mean of the token ratios. `product`: their product. `outlier`: any token's ratio."""
    rejection_low: float | None = Field(None, ge=0)
    """Lower bound of the accepted ratio. Default: 0.99 for geometric, 0.5 for product, 1e-4 for outlier (SkyRL)."""
    rejection_high: float | None = Field(None, gt=0)
    """Upper bound of the accepted ratio. Default: 1.01 for geometric, 2 for product, 100 for outlier (SkyRL)."""

    @property
    def enabled(self) -> bool:
        """True with weights or with rejected responses."""
        return self.level != "none" or self.rejection != "none"

    @model_validator(mode="after")
    def _check_rejection(self) -> Self:
        low, high = self.rejection_low, self.rejection_high
        if self.rejection == "none" and (low is not None or high is not None):
            raise ValueError("rejection_low and rejection_high have no effect with rejection 'none': remove them")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"rejection_low {low:g} is not below rejection_high {high:g}")
        return self


class OnlineDPOSection(Section):
    """Online DPO: a loss of pairs in place of the policy loss.

    The best response to a prompt is paired with the worst by shaped score, the second best with the second worst, and so on.
    Equal scores make no pair. The reference is that of the run (Guo et al. 2024).
    """

    variant: Literal["online_dpo", "xpo", "nash_md"] = "online_dpo"
    """Opponent of the policy. `online_dpo`: the policy itself. `xpo`: every second response is sampled from the reference, and
    `alpha` times its log-prob is added to the loss (Xie et al. 2024). `nash_md`: every second response is sampled from the
    geometric mixture of policy and reference. The policy is preferred with probability sigmoid(difference of scores), and the
    loss reads only `beta` (Munos et al. 2024). `xpo` and `nash_md` need `rollout.backend: transformers`, whose replicas then
    also hold the reference. Samples with odd numbers are the opponent's; metrics of rewards, KL and lengths exclude them."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down"] = "sigmoid"
    """Loss of a pair, as `train.loss` of `rayrlhf dpo`."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference; tau of IPO. Default: TRL 1.16."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs assumed to be ranked wrongly; read by `sigmoid` and `robust`."""
    alpha: float = Field(1e-5, ge=0)
    """Weight of the exploration term of `xpo`. Default: TRL 0.24."""
    mixture: float = Field(0.5, gt=0, le=1)
    """Share of the reference in the mixture of `nash_md`. Default: TRL 0.24."""

    @property
    def opponent_share(self) -> float:
        """Share of the reference in the opponent of the policy; 0 for the policy itself."""
        return {"online_dpo": 0.0, "xpo": 1.0, "nash_md": self.mixture}[self.variant]

    @model_validator(mode="after")
    def _check_variant(self) -> Self:
        nash = self.variant == "nash_md"
        unread = {
            "alpha": self.variant != "xpo" and self.alpha != 1e-5,
            "mixture": not nash and self.mixture != 0.5,
            "loss": nash and self.loss != "sigmoid",
            "label_smoothing": nash and self.label_smoothing > 0,
        }
        for key, given in unread.items():
            if given:
                raise ValueError(f"{key} has no effect on variant {self.variant}: remove it")
        return self

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g} has no effect on loss {self.loss}; expected sigmoid, robust"
            )
        return self


class ValueLossSection(Section):
    """The clipped squared error of the critic."""

    coefficient: float = Field(0.1, ge=0)
    """Weight of the value loss relative to the policy loss. It matters where both share a trunk (`critic.kind: shared`)."""
    clip: float | None = Field(0.2, gt=0)
    """Largest distance of a new value from the old one, in units of the return. null does not clip."""


class ParitySection(Section):
    """Quirks of TRL's trainers, only for comparisons with TRL's numbers."""

    mini_batch_means: bool = False
    """Divide the loss of each micro-batch by its own tokens instead of the optimizer step's (TRL's PPO trainers)."""
    clip_first_step_only: bool = False
    """Clip gradients on the first optimizer step of a run only (TRL up to 0.11)."""
    no_accumulation: bool = False
    """Step the optimizer after every micro-batch, and still divide by their number (TRL's last data batch)."""


class AlgorithmSection(Section):
    """The objective: KL penalty, scores, advantages and losses."""

    renamed_keys: ClassVar = {"correction": "off_policy_correction"}

    kl: KlSection = KlSection()
    shaping: ShapingSection = ShapingSection()
    advantage: AdvantageSection = AdvantageSection()
    old_logprobs: Literal["auto", "recomputed", "rollout"] = "auto"
    """Old log-probs, the denominator of the probability ratio. `recomputed`: a forward pass of the policy before the update.
    `rollout`: those of the rollout engine, which saves that pass; the ratio then also corrects for the engine's rounding.
    `auto`: recomputed, but skipped if a step has one optimizer step, whose ratio is 1, and nothing else reads them."""
    policy_loss: AnyPolicyLoss = PPOLossSection()
    """Loss of the policy. Its key `name` selects the loss, and with it the other keys and their defaults."""
    off_policy_correction: OffPolicyCorrectionSection = OffPolicyCorrectionSection()
    online_dpo: OnlineDPOSection | None = None
    """Loss of pairs in place of the policy loss, with `advantage.estimator: pairs`. Default: none."""
    value_loss: ValueLossSection = ValueLossSection()
    parity: ParitySection = ParitySection()
