"""Sections of `algorithm.policy_loss`: one per loss, chosen by `name`, each with defaults of its own."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rayrlhf.config.section import Section

LossAggregation = Literal["token", "sequence", "constant"]
BUILT_IN = ("ppo", "gspo", "cispo")
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
    """Policy loss: `ppo`, `gspo`, `cispo`, or a function of your own as `module:function` or `path/to/file.py:function`."""
    loss_aggregation: LossAggregation = "token"
    """Divisor of the loss of an optimizer step. `token`: the step's tokens (DAPO). `sequence`: each response's length, then the
    number of responses (GRPO, GSPO). `constant`: `loss_aggregation_length` times the number of responses (Dr. GRPO)."""
    loss_aggregation_length: int | None = Field(None, ge=1)
    """Divisor of each response under `loss_aggregation: constant`, in tokens. Default: `rollout.max_new_tokens`."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus: the mean entropy per token, in nats, times this is subtracted from the loss. The mean is
    over tokens under any `loss_aggregation`."""

    @classmethod
    def matches(cls, value: Any) -> bool:
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
    def _check_known(cls, name: Any) -> Any:
        if not isinstance(name, str):
            raise ValueError(f"expected the name of a loss or a path to a function, found {name}")
        check_name("", name, BUILT_IN)
        return name

    @field_validator("loss_aggregation", mode="before")
    @classmethod
    def _replace_null(cls, value: Any) -> Any:
        # Run folders of older versions store null for the default.
        return cls.model_fields["loss_aggregation"].default if value is None else value

    @model_validator(mode="after")
    def _check_unused_keys(self) -> Self:
        if self.loss_aggregation_length is not None and self.loss_aggregation != "constant":
            raise ValueError(
                "loss_aggregation_length has no effect without loss_aggregation 'constant': remove it, or set loss_aggregation"
            )
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
    def _drop_unused_keys(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        if settings.get("dual_clip") is not None:
            raise ValueError("dual_clip has no effect with name 'cispo', whose weight is bounded by clip_high: remove it")
        # Before 0.2.0 all losses shared one section, and run folders store all of its keys.
        return {key: value for key, value in settings.items() if key not in ("clip_low", "dual_clip")}


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


def loss_kind(value: Any) -> str:
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
    | Annotated[PluginLossSection, Tag("plugin")],
    Discriminator(loss_kind),
]
"""The section of one policy loss, selected by `name`."""
