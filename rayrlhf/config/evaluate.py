"""Root of an evaluation's configuration file: one model, one dataset, one reward."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.config.section import Section


class EvaluateRunSection(Section):
    """Name, folder and seed of an evaluation. Its folder is `root/name`."""

    name: str = Field("evaluation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Parent folder of run folders."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.root / self.name


class EvaluateDataSection(DatasetSection):
    """Prompts of the evaluation, and their conversion to tokens."""

    chat: bool = True
    """Wrap a standard prompt in the chat template as one user turn."""
    system_prompt: str | None = None
    """First message of every conversation without a system message. Default: none."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of a prompt; a longer one is an error. Default: the model's context minus `rollout.max_new_tokens`."""


class KeepSection(Section):
    """Rejection sampling: the responses kept for fine-tuning."""

    at_least: float = 1.0
    """Minimum score of a kept response. Truncated responses are never kept."""
    per_prompt: int = Field(1, ge=1)
    """Maximum kept responses per prompt, the best first; equal texts count once."""


class EvaluateConfig(Section):
    """Configuration of `rayrlhf evaluate`."""

    run: EvaluateRunSection = EvaluateRunSection()
    model: ModelSection
    data: EvaluateDataSection
    reward: RewardSection
    environment: EnvironmentSection | None = None
    """Environment of multi-turn responses, as in training. Its rewards are the reward function `environment`. Default:
    responses of one turn."""
    rollout: RolloutSection = RolloutSection()
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    samples: int = Field(1, ge=1)
    """Responses per prompt. From 2 on, best-of-k and pass@k are reported for k = 1, 2, 4, ... and all."""
    right_from: float = 1.0
    """Minimum score of a correct response, for pass@k."""
    best_by: str | None = None
    """Part of the reward that best-of-k selects by: a function's name or `reward_model`. Default: the whole score."""
    keep: KeepSection | None = None
    """Write the best responses to `kept.jsonl`, for `rayrlhf sft`. Later stages of a chain refer to it by `${this.dataset}`."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} with temperature 0: greedy responses to a prompt are all equal")
        names = [function.name for function in self.reward.functions] + ["reward_model"] * (self.reward.model is not None)
        if self.best_by is not None and self.best_by not in names:
            raise ValueError(f"best_by {self.best_by!r}: expected a part of the reward, one of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        paid = any(function.name == "environment" for function in self.reward.functions)
        if paid and self.environment is None:
            raise ValueError("reward.functions: 'environment' needs the section environment")
        if self.keep is not None and self.environment is not None:
            raise ValueError(
                "keep: SFT would train on the environment's text as if it were the model's; remove keep or environment"
            )
        return self
