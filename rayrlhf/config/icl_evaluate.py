"""The root of a k-curve's configuration file: which models answer which questions beside how many demonstrations."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.demonstrations import ContextSection, SelectionSection
from rayrlhf.config.icl_build import BuildRunSection, ExamplesSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.presft_pipeline import GenerateSection, PipelineSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.section import Section


class CurveRunSection(BuildRunSection):
    """Identity of an evaluation. Its folder is `root/name`."""

    name: str = Field("k-curve", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""


class ShotsSection(SelectionSection):
    """Which demonstrations are shown, how many of them, and how they are spoiled to see what they teach."""

    counts: list[int] = Field([0, 1, 2, 4, 8], min_length=1)
    """Numbers of demonstrations, each a point of the curve; those of a smaller one are among those of a larger one."""
    ablations: list[Literal["none", "flip", "format"]] = Field(["none"], min_length=1)
    """`none` shows them as they are, `flip` exchanges answers by a fixed rule, `format` draws them at random."""
    seeds: int = Field(3, ge=1)
    """How often everything is asked with other draws; once where nothing is drawn."""

    @model_validator(mode="after")
    def _points_are_different(self) -> Self:
        if min(self.counts) < 0 or len(set(self.counts)) < len(self.counts):
            raise ValueError(f"counts {self.counts}: expected different numbers from 0 on")
        if len(set(self.ablations)) < len(self.ablations):
            raise ValueError(f"ablations {self.ablations}: expected each once")
        return self

    @property
    def draws(self) -> int:
        """Seeds that make a difference."""
        return self.seeds if self.selection == "random" or "format" in self.ablations else 1


class ICLEvaluateConfig(Section):
    """Everything `rayrlhf icl evaluate` needs."""

    run: CurveRunSection = CurveRunSection()
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ModelSection] = Field(min_length=1)
    """Name on the curve, and of folders -> model."""
    data: ExamplesSection
    """The questions."""
    pool: ExamplesSection | None = None
    """Where demonstrations come from; the questions' own dataset when not given."""
    demonstrations: ShotsSection = ShotsSection()
    context: ContextSection = ContextSection()
    generate: GenerateSection = GenerateSection()
    metric: Literal["accuracy", "bleu", "reward"] = "accuracy"
    """Of an answer: whether it is the example's (white space, case and compatible characters aside), its sentence BLEU, or
    `reward`."""
    reward: RewardSection | None = None
    """Functions that score an answer, of `metric: reward`; they get the row's other fields as columns."""
    pipeline: PipelineSection = PipelineSection()

    @model_validator(mode="after")
    def _reward_and_metric_belong_together(self) -> Self:
        if (self.reward is not None) != (self.metric == "reward"):
            raise ValueError("reward and metric reward belong together: give both or neither")
        if self.reward is not None and self.reward.model is not None:
            raise ValueError("reward.model is not read: an answer is scored by functions")
        return self
