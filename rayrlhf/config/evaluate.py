"""The root of an evaluation's configuration file: one model, one dataset, and what its answers are judged by."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.config.section import Section


class EvaluateRunSection(Section):
    """Identity of an evaluation. Its folder is `root/name`."""

    name: str = Field("evaluation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class EvaluateDataSection(DatasetSection):
    """The prompts to answer, and how they become tokens."""

    chat: bool = True
    """Put a standard prompt into the chat template as one user turn."""
    system_prompt: str | None = None
    """First message of every conversation that does not bring a system message of its own."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longer prompts are an error; the model's context less `rollout.max_new_tokens` when not given."""


class KeepSection(Section):
    """Which answers are kept for fine-tuning: rejection sampling."""

    at_least: float = 1.0
    """Lowest score that is kept. Answers that were cut off are not."""
    per_prompt: int = Field(1, ge=1)
    """Most answers to a prompt, the best; the same text counts once."""


class EvaluateConfig(Section):
    """Everything `rayrlhf evaluate` needs."""

    run: EvaluateRunSection = EvaluateRunSection()
    model: ModelSection
    data: EvaluateDataSection
    reward: RewardSection
    environment: EnvironmentSection | None = None
    """What answers the model's turns, as in training; an answer has one turn when not given. Its rewards are the reward
    function `environment`."""
    rollout: RolloutSection = RolloutSection()
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    samples: int = Field(1, ge=1)
    """Answers to each prompt; from two on, best-of-k and pass@k are told for k = 1, 2, 4, ... and all."""
    right_from: float = 1.0
    """An answer with at least this score is right, for pass@k."""
    best_by: str | None = None
    """Part of the reward that best-of-k chooses by, a function's name or `reward_model`; the whole score when not given."""
    keep: KeepSection | None = None
    """Write the best answers to `kept.jsonl`, for `rayrlhf sft`; a chain's later stages name it `${this.dataset}`."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} with temperature 0: greedy answers to a prompt are all the same")
        names = [function.name for function in self.reward.functions] + ["reward_model"] * (self.reward.model is not None)
        if self.best_by is not None and self.best_by not in names:
            raise ValueError(f"best_by {self.best_by!r}: expected a part of the reward, one of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        paid = any(function.name == "environment" for function in self.reward.functions)
        if paid and self.environment is None:
            raise ValueError("reward.functions: 'environment' pays what an environment said: give the section environment")
        if self.keep is not None and self.environment is not None:
            raise ValueError(
                "keep: SFT would learn an environment's words as if they were answers; leave keep or environment out"
            )
        return self
