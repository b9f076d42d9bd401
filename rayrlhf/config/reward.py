"""Reward functions, reward models and judges."""

from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.judge import JudgeSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import GIB, Section


class RewardFunctionSection(Section):
    """One reward function and its weight."""

    name: str
    """Registered name, `module:function` or `path/to/file.py:function` (relative to the working directory)."""
    weight: float = 1.0
    """Weight of this part in the score."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    cache: bool = False
    """Cache scores by content. Valid only for a function whose score depends on nothing but the sample's prompt, response and
    columns: no randomness, no clock, no other sample of the batch."""
    per: Literal["response", "token", "turn"] = "response"
    """Granularity of the rewards: one number per `response`, or per response a list with one number per `token` or per `turn`
    (a segment of sampled tokens). The score is their sum. Estimators that read token rewards, such as `gae`, get each number
    at its token or at the last token of its turn."""

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache and self.per != "response":
            raise ValueError(f"cache: true stores one score per response, but the function scores per {self.per}")
        return self


class StepRewardSection(Section):
    """Rewards of a process reward model, which gives the probability that a step is right."""

    aggregate: Literal["min", "product", "last", "sum"] = "min"
    """Score of a response from the probabilities of its steps: their minimum, product or sum, or the last one. `sum` pays more
    for more steps."""
    per: Literal["step", "response"] = "step"
    """Tokens that are rewarded in PPO. `step`: the last token of each step gets the change of the score by the step (with
    `sum`, its probability). `response`: the last token gets the score. For estimators that read only scores there is no
    difference."""
    separator: str | None = Field(None, min_length=1)
    """Text between the steps of a response. Default: the one that `rayrlhf reward` stored with the model."""


class RewardModelSection(Section):
    """Reward model: a scalar-head model with its own tokenizer, or an ensemble of them."""

    renamed_keys: ClassVar = {"normalise": "normalize"}

    model: ModelSection
    members: list[ModelSection] = Field(default_factory=list)
    """Further models of an ensemble, each with its own tokenizer. The reward is the mean over `model` and these."""
    outputs: dict[str, float] | None = Field(None, min_length=1)
    """Weights of the outputs of a classifier with several outputs, by label or number; the reward is the weighted sum.
    Default: the model's only output."""
    steps: StepRewardSection | None = None
    """Scores of steps by a process reward model: one trained by `rayrlhf reward` with `kind: process`, or a token classifier
    with the labels 0 (wrong) and 1 (right). Default: the model scores whole responses."""
    uncertainty: float = Field(0.0, ge=0)
    """Penalty for disagreement: multiples of the standard deviation over the members, subtracted from their mean."""
    weight: float = 1.0
    """Weight of this part in the score."""
    template: str | None = None
    """Text that the model scores, with `{prompt}` and `{response}`. Default: the format that `rayrlhf reward` stored with the
    model (system prompt, end of sequence), or the chat template of its tokenizer."""
    max_length: int = Field(1024, ge=1)
    """Maximum tokens of the scored text; at most the model's number of positions."""
    normalize: bool = False
    """Shift and scale rewards to mean 0 and standard deviation 1 by the statistics that `rayrlhf reward` stored with each
    model."""
    offload: bool = False
    """Keep the weights in main memory and copy them to the GPU for scoring only. No effect on a CPU."""
    backend: Literal["torch", "vllm"] = "torch"
    """Engine of the model. `vllm` serves a sequence classifier (`...ForSequenceClassification`) in vLLM's pooling mode; not
    run on GPUs yet."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory of vLLM's KV cache, in GiB. Needs `backend: vllm`. Default: 0.5."""

    @property
    def models(self) -> list[ModelSection]:
        """All models of the ensemble."""
        return [self.model, *self.members]

    @property
    def cache_bytes(self) -> int:
        """Size of vLLM's KV cache."""
        return int((self.kv_cache_gib or 0.5) * GIB)

    @model_validator(mode="after")
    def _check_ensemble(self) -> Self:
        if self.uncertainty and not self.members:
            raise ValueError("uncertainty has no effect without members: one model has no disagreement")
        for model in self.models:
            model.check_scalar()
        return self

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if self.backend == "torch":
            if self.kv_cache_gib is not None:
                raise ValueError("kv_cache_gib has no effect with backend torch; remove it, or set backend: vllm")
            return self
        refused = {"members": self.members, "steps": self.steps, "offload": self.offload}
        for name in (name for name, value in refused.items() if value):
            raise ValueError(f"backend vllm does not support {name}; remove it, or set backend: torch")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and "{response}" not in self.template:
            raise ValueError("template has no {response}, the place of the response")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.steps is None:
            return self
        if self.members or self.normalize:
            raise ValueError("steps: members and normalize have no effect on probabilities of steps; remove them")
        if self.template is not None and not self.template.endswith("{response}"):
            raise ValueError("steps: expected a template that ends with {response}, where the steps are")
        return self


class RewardSection(Section):
    """Score of a response: the weighted sum of functions, reward model and judge."""

    functions: list[RewardFunctionSection] = Field(default_factory=list)
    """Reward functions; their weighted values are added."""
    model: RewardModelSection | None = None
    judge: JudgeSection | None = None
    timeout_seconds: float = Field(120.0, gt=0)
    """Maximum seconds of an asynchronous function. Synchronous ones are bounded by `deadlines.score`."""
    memory_gib: float | None = Field(None, gt=0)
    """Maximum memory, in GiB, that functions may allocate while scoring, beyond that of their process. Default: no bound."""
    files: list[Path] = Field(default_factory=list)
    """Python files to import first; they may register functions."""
    probe: bool = True
    """Call each function once on two made-up responses before the run starts, and the judge when it is loaded. Set false for a
    function that cannot run on this machine, for example because it needs a GPU."""

    @property
    def function_names(self) -> list[str]:
        """Names of the functions' parts of the score, without module or file.

        One listed twice is `name` and `name_2`.
        """
        names: list[str] = []
        for function in self.functions:
            short = function.name.rpartition(":")[2]
            names.append(next(name for name in chain([short], (f"{short}_{n}" for n in count(2))) if name not in names))
        return names

    @property
    def computed(self) -> bool:
        """True with a function or a reward model, so that the role `reward` has work."""
        return bool(self.functions) or self.model is not None

    @property
    def pays_steps(self) -> bool:
        """True if a process reward model pays single steps."""
        return self.model is not None and self.model.steps is not None and self.model.steps.per == "step"

    @property
    def configured(self) -> bool:
        """True if responses can be scored."""
        return self.computed or self.judge is not None

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if not self.configured and not getattr(self, "given_by_loop", False):
            raise ValueError("expected at least one of reward.functions, reward.model and reward.judge")
        return self


class PPORewardSection(RewardSection):
    """Reward of a PPO run, or of a loop of your own."""

    given_by_loop: bool = False
    """true: a loop of your own passes rewards to `PPOTrainer.step`, and functions and model may be missing. Not for `rayrlhf
    ppo`, whose built-in loop needs them."""
