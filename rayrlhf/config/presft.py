"""The root of a Pre-SFT configuration file: tune, probe, select, relabel, tune again."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.batch_inference import GenerateSection, PairsSection, PipelineSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection, RewardSection
from rayrlhf.config.section import Section
from rayrlhf.config.tuning.run import SupervisedCheckpointSection, WorkersSection
from rayrlhf.config.tuning.train import SupervisedTrainSection


def _check_functions_only(key: str, section: RewardSection | None) -> None:
    if section is not None and section.model is not None:
        raise ValueError(f"{key}.model is not read: a verifier is made of functions; use relabel.reward_model")


class PreSFTRunSection(Section):
    """Identity of a run. Its folder is `root/name`."""

    name: str = Field("presft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""
    rounds: int = Field(1, ge=1)
    """How often probe, select, relabel and tune are repeated, each round on the dataset of the one before."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class ProbeSection(Section):
    """How the tuned model is asked what it has learned of each pair."""

    samples: int = Field(1, ge=1)
    """Responses per prompt."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    aggregate: Literal["mean", "max"] = "mean"
    """What becomes of the scores of several responses."""
    likelihood: bool = False
    """Also compute the mean log-probability per token of the original response, and its correlation with BLEU."""
    response_field: str | None = None
    """A field that already holds a model's response: nothing is generated then."""
    model: ModelSection | None = None
    """A model that was fine-tuned on the dataset already; when not given the run tunes one."""
    tokenize: Literal["13a", "intl", "zh", "char", "flores101", "flores200", "none"] = "13a"
    """BLEU tokenizer of sacrebleu; the flores ones are downloaded on first use."""

    @model_validator(mode="after")
    def _check_greedy(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} at temperature 0 are {self.samples} times the same: set temperature")
        return self

    @model_validator(mode="after")
    def _check_given_responses(self) -> Self:
        if self.response_field is not None and (self.samples > 1 or self.likelihood):
            raise ValueError("response_field gives one response and needs no model: remove samples and likelihood")
        return self


class SelectSection(Section):
    """Which pairs count as struggling: those whose score is low."""

    rule: Literal["gap", "threshold", "quantile"] = "gap"
    """`gap` splits the histogram of scores where its two halves differ most (Otsu); the others need `value`."""
    value: float | None = Field(None, ge=0)
    """`threshold`: scores below this BLEU (0 to 100). `quantile`: this share of all pairs (0 to 1), the lowest scores first."""

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if (self.rule == "gap") != (self.value is None):
            needed = "takes no value" if self.rule == "gap" else "needs a value"
            raise ValueError(f"rule {self.rule!r} {needed}")
        if self.value is not None and self.value > (1 if self.rule == "quantile" else 100):
            raise ValueError(f"value {self.value:g} is out of range for rule {self.rule!r}")
        return self


class RelabelSection(Section):
    """What becomes of the struggling pairs."""

    method: Literal["greedy", "mbr", "reward_model", "verifier", "likelihood"] = "greedy"
    """One greedy response (the probe's own when that was greedy), or the best of `samples` by: mean BLEU to the other
    candidates (minimum Bayes risk), the reward model, the verifier, or the tuned model's log-likelihood."""
    samples: int = Field(1, ge=1)
    """Candidates per struggling prompt."""
    temperature: float = Field(1.0, gt=0)
    """Of the candidates; `greedy` does not use it."""
    struggling: Literal["replace", "mix", "drop", "keep"] = "replace"
    """`mix` trains on the original and the new response, `drop` on neither; `keep` only reports."""
    guarded: Literal["keep", "drop"] = "keep"
    """What becomes of a pair whose new response the guard refuses."""
    verifier: RewardSection | None = None
    """Reward functions that judge a response; they get the other fields of the row as columns."""
    verifier_minimum: float = 0.5
    """A new response below this verifier score is refused."""
    reward_model: RewardModelSection | None = None
    loop_repeats: int = Field(4, ge=2)
    """A response that ends in this many repeats of the same text (at least 32 characters in all) is refused."""

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method == "greedy" and self.samples > 1:
            raise ValueError("method 'greedy' takes one sample; choose mbr, reward_model, verifier or likelihood")
        if self.method == "mbr" and self.samples < 3:
            raise ValueError(f"method 'mbr' cannot choose among {self.samples}: set samples to 3 or more")
        for method, given in (("reward_model", self.reward_model), ("verifier", self.verifier)):
            if self.method == method and given is None:
                raise ValueError(f"method {method!r} needs relabel.{method}")
        _check_functions_only("relabel.verifier", self.verifier)
        return self


class QualitySection(Section):
    """How good a tuned model is on held-out rows, before and after the repair."""

    data: PairsSection
    """Held-out rows; `chat` and `system_prompt` should be those of `data`."""
    verifier: RewardSection | None = None
    """Reward functions whose mean is the quality; mean BLEU to the held-out responses is reported in any case."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""

    @model_validator(mode="after")
    def _check_verifier(self) -> Self:
        _check_functions_only("quality.verifier", self.verifier)
        return self


class PreSFTConfig(Section):
    """Everything `rayrlhf presft` needs."""

    run: PreSFTRunSection = PreSFTRunSection()
    model: ModelSection
    """The base model: every tuning starts from it."""
    data: PairsSection
    generate: GenerateSection = GenerateSection()
    probe: ProbeSection = ProbeSection()
    select: SelectSection = SelectSection()
    relabel: RelabelSection = RelabelSection()
    train: SupervisedTrainSection = SupervisedTrainSection()
    """Of every tuning."""
    checkpoint: SupervisedCheckpointSection = SupervisedCheckpointSection()
    workers: WorkersSection = WorkersSection()
    quality: QualitySection | None = None
    """Measured after every tuning when given."""
    pipeline: PipelineSection = PipelineSection()

    @model_validator(mode="after")
    def _check_relabeling(self) -> Self:
        if self.probe.response_field is not None and self.run.rounds > 1:
            raise ValueError("probe.response_field answers for one round only: set run.rounds to 1")
        sampled = self.relabels and self.relabel.method != "greedy"
        if self.probe.response_field is not None and sampled and self.probe.model is None:
            raise ValueError(f"relabel.method {self.relabel.method!r} samples new responses: give the model in probe.model")
        return self

    @property
    def relabels(self) -> bool:
        """Whether struggling pairs get new responses."""
        return self.relabel.struggling in ("replace", "mix")

    @property
    def reuses_probe(self) -> bool:
        """Whether the probe's response is the new response, so that nothing more is sampled."""
        greedy_probe = self.probe.temperature == 0 or self.probe.response_field is not None
        return self.relabel.method == "greedy" and greedy_probe
