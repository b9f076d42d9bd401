"""Root configurations of in-context learning: build, pack, evaluate, distill."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.batch_inference import GenerateSection, PairsSection, PartsSection, PipelineSection
from rayrlhf.config.data import SourceSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardSection
from rayrlhf.config.rollout import ContextSection, SelectionSection
from rayrlhf.config.section import RunFolderSection, RunName, Section
from rayrlhf.config.train import DistillationTrainSection
from rayrlhf.config.tuning import SupervisedCheckpointSection, SupervisedEvaluationSection, WorkersSection


class BuildRunSection(RunFolderSection):
    """Name, folder and seed of a build. Its folder is `root/name`."""

    name: RunName = "in-context"


class ExamplesSection(PairsSection):
    """Examples; each is a target, and a demonstration for others."""

    task_field: str | None = None
    """Column with the task of a row; demonstrations have the task of their target. Default: one task."""


class DemonstrationsSection(SelectionSection):
    """Selection and number of the demonstrations of a target."""

    least: int = Field(0, ge=0)
    """Minimum demonstrations of a target. The number is uniform from `least` to `most`; 0 leaves some samples without any."""
    most: int = Field(8, ge=1)
    """Maximum demonstrations of a target."""

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self


class SampleSection(ContextSection):
    """Layout of target and demonstrations, and the trained tokens."""

    loss_on: Literal["target", "every"] = "target"
    """Trained tokens: `target` trains on the target's answer, `every` also on the answers of the demonstrations and needs
    `layout: turns`."""
    max_tokens: int = Field(1024, ge=2)
    """Maximum tokens of a sample with its answer. Above it the farthest demonstrations are dropped first."""

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        if self.loss_on == "every" and self.layout != "turns":
            raise ValueError(f"loss_on every needs layout turns, found {self.layout}, which does not separate answers")
        return self


class BuildPipelineSection(PartsSection):
    """Processes of a build, and size of its parts."""

    builders: int | None = Field(None, ge=1)
    """Processes that retrieve and write samples; they share one memory-mapped index. Default: one per CPU."""


class ICLBuildConfig(Section):
    """Configuration of `rayrlhf icl build`."""

    run: BuildRunSection = BuildRunSection()
    model: ModelSection
    """Model whose tokenizer and chat template count tokens; no weights are loaded."""
    data: ExamplesSection
    demonstrations: DemonstrationsSection = DemonstrationsSection()
    sample: SampleSection = SampleSection()
    pipeline: BuildPipelineSection = BuildPipelineSection()


class PackRunSection(RunFolderSection):
    """Name, folder and seed of a packing. Its folder is `root/name`."""

    name: RunName = "packed"


class DocumentsSection(SourceSection):
    """Documents: JSONL, Parquet, a built-in, or a hub name."""

    text_field: str = "text"
    """Column with the text of a document."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """Maximum share of unusable rows, such as empty ones; above it the run fails. Fewer are dropped and counted."""

    def examples(self) -> ExamplesSection:
        """Return the same dataset as examples without an answer."""
        return ExamplesSection(
            path=self.path,
            split=self.split,
            subset=self.subset,
            prompt_field=self.text_field,
            response_field="",  # The other columns of a document are no answers.
            limit=self.limit,
            ignored_fields=self.ignored_fields,
            max_rejected_share=self.max_rejected_share,
        )


class NeighborsSection(Section):
    """Neighbors of a document."""

    by: Literal["bm25", "nearest"] = "bm25"
    """Similarity: `bm25` by shared words, `nearest` by the cosine of `encoder`'s vectors."""
    count: int = Field(10, ge=1)
    """Neighbors that a document is linked to; links are symmetric."""
    query_words: int = Field(32, ge=1)
    """Query words of `bm25`: the rarest ones of the document, because common ones cost the most and discriminate the least."""
    encoder: str | None = None
    """Encoder of `by: nearest`: a folder, hub name or built-in. It reads the first 256 tokens."""
    pooling: Literal["mean", "cls"] | None = None
    """Pooling of the encoder's states. Default: that of the encoder's folder."""
    resemblance: float = Field(0.8, gt=0, le=1)
    """Minimum Jaccard index of three-word shingles from which two documents count as copies; the later one is dropped."""
    resembling_words: int = Field(8, ge=1)
    """Minimum words of a document that is compared by resemblance. Shorter documents are copies only if all words are
    equal."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if (self.encoder is not None) != (self.by == "nearest"):
            raise ValueError("encoder and by nearest belong together: set both or neither")
        return self


class ICLPackConfig(Section):
    """Configuration of `rayrlhf icl pack`."""

    run: PackRunSection = PackRunSection()
    model: ModelSection
    """Model whose tokenizer encodes documents; no weights are loaded."""
    data: DocumentsSection
    neighbors: NeighborsSection = NeighborsSection()
    context: int = Field(2048, ge=2)
    """Tokens per context, equal to `data.max_length` of the training on it. Every document ends with the end-of-sequence
    token."""
    pipeline: BuildPipelineSection = BuildPipelineSection()


class CurveRunSection(RunFolderSection):
    """Name, folder and seed of an evaluation. Its folder is `root/name`."""

    name: RunName = "k-curve"


class ShotsSection(SelectionSection):
    """Numbers and ablations of demonstrations."""

    counts: list[int] = Field([0, 1, 2, 4, 8], min_length=1)
    """Numbers of demonstrations: one point of the curve for each. A larger number includes the demonstrations of a smaller
    one."""
    ablations: list[Literal["none", "flip", "format"]] = Field(["none"], min_length=1)
    """Changes to the demonstrations. `none`: unchanged. `flip`: answers exchanged by a fixed rule. `format`: random answers."""
    seeds: int = Field(3, ge=1)
    """Repetitions with different random draws; 1 if nothing is random."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if min(self.counts) < 0 or len(set(self.counts)) < len(self.counts):
            raise ValueError(f"counts {self.counts}: expected different numbers from 0 on")
        if len(set(self.ablations)) < len(self.ablations):
            raise ValueError(f"ablations {self.ablations}: expected each once")
        return self

    @property
    def draws(self) -> int:
        """Number of different random draws."""
        return self.seeds if self.selection == "random" or "format" in self.ablations else 1


class ICLEvaluateConfig(Section):
    """Configuration of `rayrlhf icl evaluate`."""

    run: CurveRunSection = CurveRunSection()
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ModelSection] = Field(min_length=1)
    """Models by name; the name is used on the curve and for folders."""
    data: ExamplesSection
    """Questions."""
    pool: ExamplesSection | None = None
    """Dataset of the demonstrations. Default: that of the questions."""
    demonstrations: ShotsSection = ShotsSection()
    context: ContextSection = ContextSection()
    generate: GenerateSection = GenerateSection()
    metric: Literal["accuracy", "bleu", "reward"] = "accuracy"
    """Score of an answer. `accuracy`: equality with the example's answer, except for white space, case and compatible
    characters. `bleu`: sentence BLEU. `reward`: the functions of `reward`."""
    reward: RewardSection | None = None
    """Reward functions of `metric: reward`; they get the other fields of the row as columns."""
    pipeline: PipelineSection = PipelineSection()

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if (self.reward is not None) != (self.metric == "reward"):
            raise ValueError("reward and metric reward belong together: set both or neither")
        for name in ("model", "judge"):
            if self.reward is not None and getattr(self.reward, name) is not None:
                raise ValueError(f"reward.{name} has no effect: answers are scored by functions; remove it")
        return self


class DistillRunSection(RunFolderSection):
    """Name, folder and seed of a distillation. Its folder is `root/name`."""

    name: RunName = "distilled"


class TeacherSection(SelectionSection):
    """Context of the teacher: demonstrations, an instruction, or both."""

    demonstrations: int = Field(8, ge=0)
    """Number of examples before the question; 0 if the context is only an instruction."""
    instruction: str | None = None
    """Start of the system turn, or of the text. Default: none."""
    responses: Literal["given", "sampled"] = "given"
    """Responses on which teacher and student are compared: the examples' own answers (`given`), or samples of the teacher with
    its context (`sampled`)."""
    temperature: float = Field(1.0, ge=0)
    """Temperature of sampled responses; 0 is greedy."""
    max_context_tokens: int = Field(1024, ge=2)
    """Maximum tokens of the teacher's context. Above it the farthest demonstrations are dropped first."""

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        if not self.demonstrations and self.instruction is None:
            raise ValueError("the teacher has the same context as the student: set demonstrations above 0, or an instruction")
        return self


class ICLDistillConfig(Section):
    """Configuration of `rayrlhf icl distill`."""

    run: DistillRunSection = DistillRunSection()
    model: ModelSection
    """Initial model of teacher and student; the teacher is not trained."""
    data: ExamplesSection
    """Prompts. Answers are needed if `teacher.responses` is `given` or if demonstrations come from this dataset."""
    pool: ExamplesSection | None = None
    """Dataset of the demonstrations. Default: that of the prompts."""
    teacher: TeacherSection = TeacherSection()
    context: ContextSection = ContextSection()
    generate: GenerateSection = GenerateSection()
    """Generation of sampled responses. `max_new_tokens` also limits given responses; longer ones are dropped and counted."""
    evaluation_share: float | None = Field(None, gt=0, lt=1)
    """Share of the prompts held out to measure the KL. Default: none."""
    train: DistillationTrainSection = DistillationTrainSection()
    evaluation: SupervisedEvaluationSection = SupervisedEvaluationSection()
    checkpoint: SupervisedCheckpointSection = SupervisedCheckpointSection()
    workers: WorkersSection = WorkersSection()
    pipeline: PipelineSection = PipelineSection()
