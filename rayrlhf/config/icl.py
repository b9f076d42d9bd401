"""The root of context distillation's configuration file: what the teacher reads beyond the student, and on which responses.

The root of an in-context dataset's configuration file: which examples are shown beside which, and what is learnt of them.

The root of a packing's configuration file: which documents are near each other, and how long a context is.

The root of a k-curve's configuration file: which models answer which questions beside how many demonstrations.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.batch_inference import GenerateSection, PairsSection, PipelineSection
from rayrlhf.config.demonstrations import ContextSection, SelectionSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.section import Section
from rayrlhf.config.tuning.run import SupervisedCheckpointSection, SupervisedEvaluationSection, WorkersSection
from rayrlhf.config.tuning.train import DistillationTrainSection


class BuildRunSection(Section):
    """Identity of a build. Its folder is `root/name`."""

    name: str = Field("in-context", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class ExamplesSection(PairsSection):
    """The examples, each a target and a demonstration of others: JSONL, Parquet, a built-in, or a hub name."""

    task_field: str | None = None
    """A column whose value is equal for rows of one task; an example is shown only beside those of its own. One task when not
    given."""


class DemonstrationsSection(SelectionSection):
    """Which examples are shown beside a target, and how many."""

    least: int = Field(0, ge=0)
    """Fewest; how many a target gets is drawn evenly from `least` to `most`, so that 0 keeps some samples without any."""
    most: int = Field(8, ge=1)
    """Most."""

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self


class SampleSection(Section):
    """How target and demonstrations are written down, and what is learnt."""

    layout: Literal["turns", "system", "text"] = "turns"
    """A user and an assistant turn each, all in the system turn, or plain text for models without a chat template."""
    loss_on: Literal["target", "every"] = "target"
    """The target's answer, or every answer, which needs `turns`."""
    question: str = "{prompt}\n"
    """How `system` and `text` write a question; it ends where the answer begins."""
    separator: str = "\n\n"
    """What `system` and `text` put between examples."""
    max_tokens: int = Field(1024, ge=2)
    """Most tokens of a sample with its answer; where more were drawn, the farthest demonstrations go first."""

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        if self.loss_on == "every" and self.layout != "turns":
            raise ValueError(f"loss_on every needs layout turns, found {self.layout}, which marks no answers apart")
        if "{prompt}" not in self.question:
            raise ValueError("question has no {prompt} in it, where the prompt goes")
        return self


class BuildPipelineSection(Section):
    """Processes, and how work is cut."""

    rows_per_part: int = Field(1024, ge=1)
    """Rows of one part file: what a process makes at once, and the most that a crash makes it do again."""
    builders: int | None = Field(None, ge=1)
    """Processes that retrieve and write samples; one a CPU when not given. They share one memory-mapped index."""
    max_restarts: int = Field(5, ge=0)
    """How often a process that died is started again before the run gives up."""
    stall_seconds: float = Field(1800.0, gt=0)
    """Give up when nothing makes progress for so long."""
    address: str | None = None
    """Ray address; a job's own cluster, or a new local one, when not given."""


class ICLBuildConfig(Section):
    """Everything `rayrlhf icl build` needs."""

    run: BuildRunSection = BuildRunSection()
    model: ModelSection
    """Whose tokenizer and chat template count tokens; no weights are loaded."""
    data: ExamplesSection
    demonstrations: DemonstrationsSection = DemonstrationsSection()
    sample: SampleSection = SampleSection()
    pipeline: BuildPipelineSection = BuildPipelineSection()


class PackRunSection(Section):
    """Identity of a packing. Its folder is `root/name`."""

    name: str = Field("packed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Of the order by lot, the baseline."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class DocumentsSection(Section):
    """The documents: JSONL, Parquet, a built-in, or a hub name."""

    path: str
    """Also a folder in the hub's layout, or one that `save_to_disk` of the `datasets` package wrote."""
    split: str = "train"
    """Of a hub or built-in dataset."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    text_field: str = "text"
    """A document's text."""
    limit: int | None = Field(None, ge=1)
    """Use only the first n rows."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the rows is unusable, for example empty; fewer are left out and counted."""

    def examples(self) -> ExamplesSection:
        """Return the same dataset as examples without an answer."""
        return ExamplesSection(
            path=self.path,
            split=self.split,
            subset=self.subset,
            prompt_field=self.text_field,
            response_field="",  # Whatever a document's other columns hold is no answer.
            limit=self.limit,
            max_rejected_share=self.max_rejected_share,
        )


class NeighborsSection(Section):
    """Which documents are near each other."""

    by: Literal["bm25", "nearest"] = "bm25"
    """The words that documents share, or the cosine of `encoder`'s vectors."""
    count: int = Field(10, ge=1)
    """Neighbours a document is joined to; each joins both."""
    query_words: int = Field(32, ge=1)
    """Of `bm25`: a document asks with this many of its words, the rarest, since common ones cost most and say least."""
    encoder: str | None = None
    """Of `nearest`: a folder, hub name or built-in. It reads the first 256 tokens."""
    pooling: Literal["mean", "cls"] | None = None
    """How the encoder's states become a vector; the encoder's folder says it when not given."""
    resemblance: float = Field(0.8, gt=0, le=1)
    """From this resemblance on (Jaccard index of three-word shingles) the later of two documents is left out, as a copy."""
    resembling_words: int = Field(8, ge=1)
    """Documents with fewer words are left out only if all their words are equal."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if (self.encoder is not None) != (self.by == "nearest"):
            raise ValueError("encoder and by nearest belong together: give both or neither")
        return self


class ICLPackConfig(Section):
    """Everything `rayrlhf icl pack` needs."""

    run: PackRunSection = PackRunSection()
    model: ModelSection
    """Whose tokenizer makes the tokens; no weights are loaded."""
    data: DocumentsSection
    neighbors: NeighborsSection = NeighborsSection()
    context: int = Field(2048, ge=2)
    """Tokens of a context, as long as `data.max_length` of the training that reads it. Every document ends with the
    end-of-sequence token."""
    pipeline: BuildPipelineSection = BuildPipelineSection()


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
    def _check_counts(self) -> Self:
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
    def _check_metric(self) -> Self:
        if (self.reward is not None) != (self.metric == "reward"):
            raise ValueError("reward and metric reward belong together: give both or neither")
        if self.reward is not None and self.reward.model is not None:
            raise ValueError("reward.model is not read: an answer is scored by functions")
        return self


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
    def _check_context(self) -> Self:
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
