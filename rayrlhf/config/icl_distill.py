"""The root of context distillation's configuration file: what the teacher reads beyond the student, and on which responses."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.demonstrations import ContextSection, SelectionSection
from rayrlhf.config.icl_build import BuildRunSection, ExamplesSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.presft_pipeline import GenerateSection, PipelineSection
from rayrlhf.config.section import Section
from rayrlhf.config.tuning_run import SupervisedCheckpointSection, SupervisedEvaluationSection, WorkersSection
from rayrlhf.config.tuning_train import DistillationTrainSection


class DistillRunSection(BuildRunSection):
    """Identity of a distillation. Its folder is `root/name`."""

    name: str = Field("distilled", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""


class TeacherSection(SelectionSection):
    """What the teacher reads and the student does not: demonstrations, an instruction, or both."""

    demonstrations: int = Field(8, ge=0)
    """Examples before the question; 0 for an instruction alone."""
    instruction: str | None = None
    """First words of the system turn, or of the text."""
    responses: Literal["given", "sampled"] = "given"
    """What both are compared on: the examples' own answers, or answers that the teacher samples beside its context."""
    temperature: float = Field(1.0, ge=0)
    """Of sampled responses; 0 is greedy."""
    max_context_tokens: int = Field(1024, ge=2)
    """Most tokens of what the teacher reads before its answer; the farthest demonstrations go first."""

    @model_validator(mode="after")
    def _reads_more_than_the_student(self) -> Self:
        if not self.demonstrations and self.instruction is None:
            raise ValueError("the teacher reads no more than the student: give demonstrations above 0, an instruction, or both")
        return self


class ICLDistillConfig(Section):
    """Everything `rayrlhf icl distill` needs."""

    run: DistillRunSection = DistillRunSection()
    model: ModelSection
    """Teacher and student both begin with it; the teacher stays as it is."""
    data: ExamplesSection
    """The prompts; with answers where `teacher.responses` is `given`, or demonstrations come from here."""
    pool: ExamplesSection | None = None
    """Where demonstrations come from; the prompts' own dataset when not given."""
    teacher: TeacherSection = TeacherSection()
    context: ContextSection = ContextSection()
    generate: GenerateSection = GenerateSection()
    """Of sampled responses; `max_new_tokens` bounds given ones too, and longer ones are left out and counted."""
    evaluation_share: float | None = Field(None, gt=0, lt=1)
    """Share of the prompts held out to measure the KL on; none when not given."""
    train: DistillationTrainSection = DistillationTrainSection()
    evaluation: SupervisedEvaluationSection = SupervisedEvaluationSection()
    checkpoint: SupervisedCheckpointSection = SupervisedCheckpointSection()
    workers: WorkersSection = WorkersSection()
    pipeline: PipelineSection = PipelineSection()
