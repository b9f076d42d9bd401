"""What a response is worth."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import Section


class RewardFunctionSection(Section):
    """One reward function: a registered name, or `module:function`, or `path/to/file.py:function`."""

    name: str
    """Registered name, `module:function` or `path/to/file.py:function`."""
    weight: float = 1.0
    """Of its part in the sum."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function."""
    cache: bool = False
    """Remember values by content. Only for a function whose value for a sample depends on that sample's prompt, response and
    columns alone: no chance, no clock, no other sample of the batch."""
    per: Literal["response", "token", "turn"] = "response"
    """What the function returns a number for: each `response`, or a list of numbers per response, one for each `token`, or for
    each `turn` (a stretch of sampled tokens). The score counts their sum; an estimator that reads token rewards, as `gae` does,
    sees each at its token or at the last token of its turn."""

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache and self.per != "response":
            raise ValueError(f"cache: true remembers one number a response, and the function pays per {self.per}")
        return self


class RewardModelSection(Section):
    """A scalar-head model that scores text, with its own tokenizer and template; or several of them as one."""

    renamed_keys: ClassVar = {"normalise": "normalize"}

    model: ModelSection
    members: list[ModelSection] = Field(default_factory=list)
    """More models of the same kind, each with its own tokenizer; the reward is the mean over `model` and these."""
    uncertainty: float = Field(0.0, ge=0)
    """Standard deviations over the members that are taken off their mean."""
    weight: float = 1.0
    """Of its part in the sum."""
    template: str | None = None
    """Text given to the model, with `{prompt}` and `{response}`. When not given: the format that `rayrlhf reward` stored with
    the model (system prompt, end of sequence), or the chat template of its tokenizer."""
    max_length: int = Field(1024, ge=1)
    """Longest text in tokens."""
    normalize: bool = False
    """Shift and scale rewards to mean 0 and spread 1 by the statistics that `rayrlhf reward` stored with the model; each
    member by its own."""
    offload: bool = False
    """Keep the weights in main memory and copy them to the GPU only while responses are scored; on a CPU nothing changes."""

    @property
    def models(self) -> list[ModelSection]:
        """All members."""
        return [self.model, *self.members]

    @model_validator(mode="after")
    def _check_ensemble(self) -> Self:
        if self.uncertainty and not self.members:
            raise ValueError("uncertainty needs members: one model alone does not disagree with itself")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and "{response}" not in self.template:
            raise ValueError("template has no {response} in it, where the response goes")
        return self


class RewardSection(Section):
    """A response's score is the weighted sum of all functions and the reward model."""

    functions: list[RewardFunctionSection] = Field(default_factory=list)
    """Functions whose values are added up."""
    model: RewardModelSection | None = None
    timeout_seconds: float = Field(120.0, gt=0)
    """Longest time an asynchronous function may take; one that is not is bounded by `deadlines.score`."""
    memory_gib: float | None = Field(None, gt=0)
    """Most memory, in GiB, that the functions may take while they score, beyond what their process holds; no bound when not
    given."""
    files: list[Path] = Field(default_factory=list)
    """Python files to import first, so that they can register functions of their own."""

    @property
    def configured(self) -> bool:
        """True with a function or a model, so that responses can be scored."""
        return bool(self.functions) or self.model is not None

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if not self.configured and not getattr(self, "given_by_loop", False):
            raise ValueError("give at least one of reward.functions and reward.model")
        return self


class PPORewardSection(RewardSection):
    """The reward of a PPO run; a loop of your own may give it instead."""

    given_by_loop: bool = False
    """True: the loop passes its own rewards to `PPOTrainer.step`, and functions and model may be left out. Not for `rayrlhf
    ppo`, whose built-in loop has none to pass."""
