"""Root of a Pre-SFT configuration file: tune, probe, select, relabel, tune again."""

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
        raise ValueError(f"{key}.model has no effect: a verifier consists of functions; use relabel.reward_model")


class PreSFTRunSection(Section):
    """Name, folder, seed and rounds of a run. Its folder is `root/name`."""

    name: str = Field("presft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Parent folder of run folders."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    rounds: int = Field(1, ge=1)
    """Rounds of probe, select, relabel and tune, each on the dataset of the previous one."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.root / self.name


class ProbeSection(Section):
    """Probe of the tuned model on each pair."""

    samples: int = Field(1, ge=1)
    """Responses per prompt."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    aggregate: Literal["mean", "max"] = "mean"
    """Aggregation of the scores of several responses."""
    likelihood: bool = False
    """Also compute the mean log-probability per token of the original response, and its correlation with BLEU."""
    response_field: str | None = None
    """Column that already holds the model's response, so nothing is generated. Default: generate."""
    model: ModelSection | None = None
    """Model that is already fine-tuned on the dataset. Default: the run tunes one."""
    tokenize: Literal["13a", "intl", "zh", "char", "flores101", "flores200", "none"] = "13a"
    """BLEU tokenizer of sacrebleu. Those of flores are downloaded on first use."""

    @model_validator(mode="after")
    def _check_greedy(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} at temperature 0 are all equal: set temperature")
        return self

    @model_validator(mode="after")
    def _check_given_responses(self) -> Self:
        if self.response_field is not None and (self.samples > 1 or self.likelihood):
            raise ValueError("response_field holds one response and needs no model: remove samples and likelihood")
        return self


class SelectSection(Section):
    """Selection of struggling pairs: those with low scores."""

    rule: Literal["gap", "threshold", "quantile"] = "gap"
    """Threshold rule. `gap` splits the histogram of scores where its halves differ the most (Otsu); the others need `value`."""
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
    """New responses of struggling pairs."""

    method: Literal["greedy", "mbr", "reward_model", "verifier", "likelihood"] = "greedy"
    """New response. `greedy`: one greedy response (the probe's, if that was greedy). Else the best of `samples` by: mean BLEU
    to the other candidates (`mbr`, minimum Bayes risk), the reward model, the verifier, or the tuned model's log-likelihood."""
    samples: int = Field(1, ge=1)
    """Candidates per struggling prompt."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the candidates. No effect on `greedy`."""
    struggling: Literal["replace", "mix", "drop", "keep"] = "replace"
    """Use of struggling pairs. `replace`: the new response. `mix`: both responses. `drop`: neither. `keep`: only report."""
    guarded: Literal["keep", "drop"] = "keep"
    """Use of a pair whose new response is refused by the guard: `keep` the original, or `drop` the pair."""
    verifier: RewardSection | None = None
    """Reward functions that verify a response; they get the other fields of the row as columns. Default: none."""
    verifier_minimum: float = 0.5
    """Minimum verifier score of a new response."""
    reward_model: RewardModelSection | None = None
    """Reward model of `method: reward_model`."""
    loop_repeats: int = Field(4, ge=2)
    """Repeats of the same text (at least 32 characters in all) at a response's end from which on it is refused."""

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method == "greedy" and self.samples > 1:
            raise ValueError("method 'greedy' takes one sample: expected mbr, reward_model, verifier or likelihood")
        if self.method == "mbr" and self.samples < 3:
            raise ValueError(f"method 'mbr' cannot choose among {self.samples}: set samples to 3 or more")
        for method, given in (("reward_model", self.reward_model), ("verifier", self.verifier)):
            if self.method == method and given is None:
                raise ValueError(f"method {method!r} needs relabel.{method}")
        _check_functions_only("relabel.verifier", self.verifier)
        return self


class QualitySection(Section):
    """Quality of a tuned model on held-out rows, before and after relabeling."""

    data: PairsSection
    """Held-out rows; `chat` and `system_prompt` should be those of `data`."""
    verifier: RewardSection | None = None
    """Reward functions whose mean is the quality. Mean BLEU to the held-out responses is always reported."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""

    @model_validator(mode="after")
    def _check_verifier(self) -> Self:
        _check_functions_only("quality.verifier", self.verifier)
        return self


class PreSFTConfig(Section):
    """Configuration of `rayrlhf presft`."""

    run: PreSFTRunSection = PreSFTRunSection()
    model: ModelSection
    """Base model, from which every tuning starts."""
    data: PairsSection
    generate: GenerateSection = GenerateSection()
    probe: ProbeSection = ProbeSection()
    select: SelectSection = SelectSection()
    relabel: RelabelSection = RelabelSection()
    train: SupervisedTrainSection = SupervisedTrainSection()
    """Training of every tuning."""
    checkpoint: SupervisedCheckpointSection = SupervisedCheckpointSection()
    workers: WorkersSection = WorkersSection()
    quality: QualitySection | None = None
    """Quality measurement after every tuning. Default: none."""
    pipeline: PipelineSection = PipelineSection()

    @model_validator(mode="after")
    def _check_relabeling(self) -> Self:
        if self.probe.response_field is not None and self.run.rounds > 1:
            raise ValueError("probe.response_field holds responses of one round only: set run.rounds to 1")
        sampled = self.relabels and self.relabel.method != "greedy"
        if self.probe.response_field is not None and sampled and self.probe.model is None:
            raise ValueError(f"relabel.method {self.relabel.method!r} samples new responses: set probe.model")
        return self

    @property
    def relabels(self) -> bool:
        """True if struggling pairs get new responses."""
        return self.relabel.struggling in ("replace", "mix")

    @property
    def reuses_probe(self) -> bool:
        """True if the probe's response is the new response, so that no more are sampled."""
        greedy_probe = self.probe.temperature == 0 or self.probe.response_field is not None
        return self.relabel.method == "greedy" and greedy_probe
