"""Sections of `algorithm.policy_loss`: one per loss, chosen by `name`, each with defaults of its own."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rayrlhf.config.section import Section

LossAggregation = Literal["token", "sequence", "constant", "prompt"]
BUILT_IN = ("ppo", "gspo", "cispo", "sapo", "gmpo", "dppo", "topr", "clip_cov", "kl_cov")
TOKEN_CLIP_FLOOR = 0.01
"""Clip ranges of token ratios are at least this wide, those of GSPO's response ratios at most: published ones are 20 times
away."""


def check_name(key: str, name: str, known: Iterable[str], noun: str = "function") -> None:
    """Refuse a name that is neither known nor a plugin path.

    Args:
        key: begins the error message; empty where the loader adds it.
        noun: term for a plugin in the message.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    known = list(known)
    if name in known or ":" in name:
        return
    near = difflib.get_close_matches(name, known, n=1)
    expected = f"expected one of {', '.join(known)}, module:{noun} or path/to/file.py:{noun}"
    raise ValueError(f"{key}{': ' if key else ''}unknown name {name!r}; {f'did you mean {near[0]}?' if near else expected}")


class PolicyLossSection(Section):
    """Policy loss. `name` selects the loss, its other keys and their defaults."""

    renamed_keys: ClassVar = {"normalisation": "loss_aggregation", "normalisation_length": "loss_aggregation_length"}
    kind: ClassVar[str] = "ppo"
    """Tag of the section: a built-in name, or `plugin`."""

    name: str = "ppo"
    """Policy loss: `ppo`, `gspo`, `cispo`, `sapo`, `gmpo`, `dppo`, `topr`, `clip_cov`, `kl_cov`, or a function of your own as
    `module:function` or `path/to/file.py:function`."""
    loss_aggregation: LossAggregation = "token"
    """Divisor of the loss of an optimizer step. `token`: the step's tokens (DAPO). `sequence`: each response's length, then the
    number of responses (GRPO, GSPO). `constant`: `loss_aggregation_length` times the number of responses (Dr. GRPO). `prompt`:
    the tokens of all responses to a prompt in the step, then the number of prompts (ScaleRL, Khatri et al. 2025)."""
    loss_aggregation_length: int | None = Field(None, ge=1)
    """Divisor of each response under `loss_aggregation: constant`, in tokens. Default: `rollout.max_new_tokens`."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus: the mean entropy per token, in nats, times this is subtracted from the loss. The mean is
    over tokens under any `loss_aggregation`."""
    positive_coefficient: float = Field(0.0, ge=0)
    """Weight of the language-model loss of correct responses (VAPO, Yue et al. 2025, who use 0.1): the mean negative log-prob
    of their tokens in the step, under any `loss_aggregation`."""
    right_from: float = 1.0
    """Minimum score of a correct response, before `algorithm.shaping`; read by `positive_coefficient`."""

    @classmethod
    def matches(cls, value: object) -> bool:
        """Return True where settings belong to the section of this loss."""
        return cls is PolicyLossSection or loss_kind(value) == cls.kind

    @property
    def loss_arguments(self) -> Mapping[str, Any]:
        """Keyword arguments of the loss function."""
        return self.model_dump(exclude=set(PolicyLossSection.model_fields))

    @property
    def clip_warning(self) -> str | None:
        """One line where the clip range is that of another loss; None where it fits."""
        return None

    @field_validator("name", mode="before")
    @classmethod
    def _check_known(cls, name: object) -> Any:
        if not isinstance(name, str):
            raise ValueError(f"expected the name of a loss or a path to a function, found {name}")
        check_name("", name, BUILT_IN)
        return name

    @field_validator("loss_aggregation", mode="before")
    @classmethod
    def _replace_null(cls, value: object) -> Any:
        # Run folders of older versions store null for the default.
        return cls.model_fields["loss_aggregation"].default if value is None else value

    @model_validator(mode="after")
    def _check_unused_keys(self) -> Self:
        if self.loss_aggregation_length is not None and self.loss_aggregation != "constant":
            raise ValueError(
                "loss_aggregation_length has no effect without loss_aggregation 'constant': remove it, or set loss_aggregation"
            )
        if self.right_from != 1.0 and not self.positive_coefficient:
            raise ValueError("right_from has no effect without positive_coefficient: remove it, or set positive_coefficient")
        return self


class PPOLossSection(PolicyLossSection):
    """The clipped surrogate on token ratios (Schulman et al. 2017, equation 7)."""

    name: Literal["ppo"] = "ppo"
    """`ppo`: the clipped surrogate on token ratios (Schulman et al. 2017, equation 7)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip range: the gradient of a token ends where its ratio falls below 1 - `clip_low`. Default: Schulman et al.
    2017."""
    clip_high: float = Field(0.2, gt=0)
    """Upper clip range: the gradient of a token ends where its ratio exceeds 1 + `clip_high`. Above `clip_low` it is DAPO's
    clip-higher (0.28)."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of a token with a negative advantage, in multiples of the advantage (Ye et al. 2020, who use 3).
    Default: no bound."""

    @property
    def clip_warning(self) -> str | None:
        """One line where the clip range is GSPO's."""
        if max(self.clip_low, self.clip_high) >= TOKEN_CLIP_FLOOR:
            return None
        return (
            f"algorithm.policy_loss: ppo clips token ratios, and clip_low {self.clip_low:g}, clip_high {self.clip_high:g} "
            "is a range for gspo's response ratios: nearly every token would be clipped; expected about 0.2"
        )


class GSPOLossSection(PolicyLossSection):
    """The clipped surrogate on one ratio per response (Zheng et al. 2025, equation 5)."""

    kind: ClassVar[str] = "gspo"

    name: Literal["gspo"]
    """`gspo`: the clipped surrogate on one ratio per response, the geometric mean of its token ratios (Zheng et al. 2025)."""
    clip_low: float = Field(3e-4, gt=0, lt=1)
    """Lower clip range of the response's ratio. Default: section 5.1 of the paper. The ratio of a response moves far less than
    that of a token, so the 0.2 of `ppo` would never clip."""
    clip_high: float = Field(4e-4, gt=0)
    """Upper clip range of the response's ratio. Default: section 5.1 of the paper."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of a response with a negative advantage, in multiples of the advantage. Default: no bound."""
    loss_aggregation: LossAggregation = "sequence"
    """Divisor of the loss of an optimizer step, see the loss `ppo`. Default: equation 5 of the paper."""

    @property
    def clip_warning(self) -> str | None:
        """One line where the clip range is that of token ratios."""
        if max(self.clip_low, self.clip_high) < TOKEN_CLIP_FLOOR:
            return None
        return (
            f"algorithm.policy_loss: gspo clips the ratio of a whole response, and clip_low {self.clip_low:g}, clip_high "
            f"{self.clip_high:g} is a range for ppo's token ratios: nothing would be clipped; expected about 3e-4 and 4e-4"
        )


class CISPOLossSection(PolicyLossSection):
    """REINFORCE with a bounded importance weight (MiniMax 2025, "MiniMax-M1", equations 4 and 5)."""

    kind: ClassVar[str] = "cispo"

    name: Literal["cispo"]
    """`cispo`: REINFORCE with a bounded, detached importance weight per token (MiniMax 2025, "MiniMax-M1", equations 4 and
    5)."""
    clip_high: float = Field(4.0, gt=0)
    """Upper bound of the importance weight minus 1: the weight is min(ratio, 1 + `clip_high`). The default bounds it at 5, the
    value of ScaleRL (Khatri et al. 2025) and TRL 1.16.0, whose `epsilon_high` is the bound itself. MiniMax-M1 gives no number.
    There is no lower bound."""

    @property
    def clip_warning(self) -> str | None:
        """One line where the bound is PPO's."""
        if self.clip_high >= 1:
            return None
        return (
            f"algorithm.policy_loss: cispo bounds the weight at 1 + clip_high = {1 + self.clip_high:g}, a clip range of ppo: "
            "expected clip_high about 4 (a bound of 5)"
        )

    @model_validator(mode="before")
    @classmethod
    def _drop_unused_keys(cls, settings: object) -> Any:
        if not isinstance(settings, dict):
            return settings
        if settings.get("dual_clip") is not None:
            raise ValueError("dual_clip has no effect with name 'cispo', whose weight is bounded by clip_high: remove it")
        # Before 0.2.0 all losses shared one section, and run folders store all of its keys.
        return {key: value for key, value in settings.items() if key not in ("clip_low", "dual_clip")}


class SAPOLossSection(PolicyLossSection):
    """A smooth gate on token ratios (Gao et al. 2025, "Soft Adaptive Policy Optimization")."""

    kind: ClassVar[str] = "sapo"

    name: Literal["sapo"]
    """`sapo`: the ratio passes a sigmoid gate instead of a clip (Gao et al. 2025, "Soft Adaptive Policy Optimization")."""
    temperature_positive: float = Field(1.0, gt=0)
    """Temperature of the gate of tokens with a positive advantage; a larger one closes sooner. Default: the paper and TRL
    1.16."""
    temperature_negative: float = Field(1.05, gt=0)
    """Temperature of the gate of all other tokens. Default: the paper and TRL 1.16."""
    loss_aggregation: LossAggregation = "sequence"
    """Divisor of the loss of an optimizer step, see the loss `ppo`. Default: the paper."""


class GMPOLossSection(PolicyLossSection):
    """The geometric mean of clipped token ratios (Zhao et al. 2025, "Geometric-Mean Policy Optimization")."""

    kind: ClassVar[str] = "gmpo"

    name: Literal["gmpo"]
    """`gmpo`: one ratio per response, the geometric mean of its clipped token ratios (Zhao et al. 2025)."""
    clip_low: float = Field(0.4, gt=0)
    """Lower clip range of a token's log-ratio: it counts as at least -`clip_low`. Default: the paper."""
    clip_high: float = Field(0.4, gt=0)
    """Upper clip range of a token's log-ratio. Default: the paper, whose ratios are within (e^-0.4, e^0.4)."""
    loss_aggregation: LossAggregation = "sequence"
    """Divisor of the loss of an optimizer step, see the loss `ppo`. Default: the paper."""


class DPPOLossSection(PolicyLossSection):
    """A trust region by divergence (Qi et al. 2026)."""

    kind: ClassVar[str] = "dppo"

    name: Literal["dppo"]
    """`dppo`: masks tokens whose distribution has moved too far in the direction of their advantage (Qi et al. 2026,
    "Rethinking the Trust Region in LLM Reinforcement Learning")."""
    divergence: Literal["tv", "kl"] = "tv"
    """Distance of the two events "this token" and "another one": `tv` |p - p_old|, `kl` KL(p_old || p)."""
    threshold: float | None = Field(None, gt=0)
    """Divergence beyond which a token has no gradient. Default: the authors' script, 0.15 for `tv` and 0.05 for `kl`."""
    ratio_high: float = Field(20.0, gt=1)
    """Upper bound of a token's importance weight. Default: the authors' code."""


class TOPRLossSection(PolicyLossSection):
    """REINFORCE with tapered negative weights (Le Roux et al. 2025, "Tapered Off-Policy REINFORCE")."""

    kind: ClassVar[str] = "topr"

    name: Literal["topr"]
    """`topr`: REINFORCE with the weight 1 for responses with a positive advantage, and their bounded probability ratio for the
    others (Le Roux et al. 2025)."""
    weight_high: float = Field(1.0, gt=0)
    """Upper bound of the ratio of a response without a positive advantage. Default: the paper."""
    loss_aggregation: LossAggregation = "constant"
    """Divisor of the loss of an optimizer step, see the loss `ppo`. Default: as in the paper, which sums over a response
    without the constant."""


class ClipCovLossSection(PolicyLossSection):
    """PPO without the gradient of a few tokens with high covariance (Cui et al. 2025)."""

    kind: ClassVar[str] = "clip_cov"

    name: Literal["clip_cov"]
    """`clip_cov`: PPO's loss, without gradient at a few tokens whose advantage and log-prob covary strongly (Cui et al. 2025,
    "The Entropy Mechanism of Reinforcement Learning")."""
    share: float = Field(2e-4, gt=0, le=1)
    """Tokens to select, as a share of the step's tokens; at least one. Default: the paper."""
    cov_low: float = 1.0
    """Lower bound of the covariance of a selected token. Default: the paper."""
    cov_high: float = 5.0
    """Upper bound of the covariance of a selected token. Default: the paper."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip range, see the loss `ppo`."""
    clip_high: float = Field(0.2, gt=0)
    """Upper clip range, see the loss `ppo`."""


class KLCovLossSection(PolicyLossSection):
    """The policy gradient with a KL penalty on a few tokens (Cui et al. 2025)."""

    kind: ClassVar[str] = "kl_cov"

    name: Literal["kl_cov"]
    """`kl_cov`: the unclipped policy gradient, with a KL penalty at the tokens whose advantage and log-prob covary most (Cui et
    al. 2025, "The Entropy Mechanism of Reinforcement Learning")."""
    share: float = Field(2e-3, gt=0, le=1)
    """Tokens to penalize, as a share of the step's tokens; at least one. Default: the paper's value for 7B models (2e-4 for
    32B)."""
    penalty: float = Field(1.0, ge=0)
    """Weight of the absolute log-ratio between the policy and the policy before the step. Default: the paper."""


class PluginLossSection(PolicyLossSection):
    """A policy loss from outside the package."""

    kind: ClassVar[str] = "plugin"

    name: str = Field(pattern=":")
    """A function of your own, `module:function` or `path/to/file.py:function` (relative to the working directory), with the
    signature of `rayrlhf.algorithms.policy_losses.PolicyLoss`. Every policy rank imports it."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""

    @property
    def loss_arguments(self) -> Mapping[str, Any]:
        """Keyword arguments of the loss function."""
        return self.arguments


def loss_kind(value: object) -> str:
    """Return the section's tag of a tree of settings or of a section."""
    if isinstance(value, PolicyLossSection):
        return value.kind
    name = value.get("name", "ppo") if isinstance(value, dict) else "ppo"
    if isinstance(name, str) and ":" in name:
        return "plugin"
    return name if name in BUILT_IN else "ppo"


AnyPolicyLoss = Annotated[
    Annotated[PPOLossSection, Tag("ppo")]
    | Annotated[GSPOLossSection, Tag("gspo")]
    | Annotated[CISPOLossSection, Tag("cispo")]
    | Annotated[SAPOLossSection, Tag("sapo")]
    | Annotated[GMPOLossSection, Tag("gmpo")]
    | Annotated[DPPOLossSection, Tag("dppo")]
    | Annotated[TOPRLossSection, Tag("topr")]
    | Annotated[ClipCovLossSection, Tag("clip_cov")]
    | Annotated[KLCovLossSection, Tag("kl_cov")]
    | Annotated[PluginLossSection, Tag("plugin")],
    Discriminator(loss_kind),
]
"""The section of one policy loss, selected by `name`."""
