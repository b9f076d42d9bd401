"""Root configurations of evaluations, chains and Pre-SFT."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.batch_inference import GenerateSection, PairsSection, PipelineSection
from rayrlhf.config.data import DatasetSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection, RewardSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.config.section import FolderSection, RunFolderSection, RunName, Section
from rayrlhf.config.train import SupervisedTrainSection
from rayrlhf.config.tuning import SupervisedCheckpointSection, WorkersSection


class EvaluateRunSection(RunFolderSection):
    """Name, folder and seed of an evaluation. Its folder is `root/name`."""

    name: RunName = "evaluation"


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
    """Part of the reward by which best-of-k selects: a function's name, `reward_model` or `judge_model`. Default: the whole
    score."""
    keep: KeepSection | None = None
    """Write the best responses to `kept.jsonl`, for `rayrlhf sft`. Later stages of a chain refer to it by `${this.dataset}`."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} with temperature 0: greedy responses to a prompt are all equal")
        names = self.reward.function_names + ["reward_model"] * (self.reward.model is not None)
        names += ["judge_model"] * (self.reward.judge is not None)
        if self.best_by is not None and self.best_by not in names:
            raise ValueError(f"best_by {self.best_by!r}: expected a part of the reward, one of {', '.join(names)}")
        judge = self.reward.judge
        if judge is not None and judge.mode != "pointwise" and judge.against is None and self.samples == 1:
            raise ValueError(
                f"reward.judge.mode '{judge.mode}' compares responses to one prompt: set samples to 2 or more, or "
                "reward.judge.against to a column with a response"
            )
        if judge is not None:
            judge.check_letters(self.samples, "samples")
        return self

    @model_validator(mode="after")
    def _check_routing(self) -> Self:
        if self.rollout.replays_routing:
            raise ValueError(
                f"rollout.routing_replay '{self.rollout.routing_replay}' has no effect without training; expected 'off'"
            )
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


StageKind = Literal["sft", "reward", "dpo", "ppo", "evaluate", "icl-build", "icl-pack", "icl-distill", "icl-evaluate"]


class ChainRunSection(FolderSection):
    """Name and folder of a chain.

    The folder is `root/name`, with one run folder per stage.
    """

    name: RunName = "chain"


class StageSection(Section):
    """One stage: a command with a configuration file, settings, or both.

    Settings replace those of the file.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the stage's run folder; later stages refer to it by this name."""
    kind: StageKind
    """Command of the stage."""
    config: Path | None = None
    """Configuration file, relative to the folder of the chain's file."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections and keys of the command. `${STAGE.OUTPUT}` in a text is an output of an earlier stage, such as
    `${sft.export}`."""


class ChainConfig(Section):
    """Configuration of `rayrlhf run`."""

    run: ChainRunSection = ChainRunSection()
    stages: list[StageSection] = Field(min_length=1)
    """Stages in the order of their runs."""
    address: str | None = None
    """Ray address of all stages. Default: the cluster of the job, or a new local one."""

    @model_validator(mode="after")
    def _check_stage_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: duplicate name {name!r}")
        return self


def _check_functions_only(key: str, section: RewardSection | None) -> None:
    for name in ("model", "judge"):
        if section is not None and getattr(section, name) is not None:
            raise ValueError(f"{key}.{name} has no effect: a verifier consists of functions; use relabel.reward_model")


class PreSFTRunSection(RunFolderSection):
    """Name, folder, seed and rounds of a run. Its folder is `root/name`."""

    name: RunName = "presft"
    rounds: int = Field(1, ge=1)
    """Rounds of probe, select, relabel and tune, each on the dataset of the previous one."""


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
    """Column that already has the model's response; nothing is generated then. Default: generate."""
    model: ModelSection | None = None
    """Model that is already fine-tuned on the dataset. Default: the run tunes one."""
    tokenize: Literal["auto", "13a", "intl", "zh", "char", "flores101", "flores200", "none"] = "auto"
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
    """Treatment of struggling pairs: train on the new response (`replace`), on both responses (`mix`), on neither (`drop`), or
    on the original, with a report only (`keep`)."""
    guarded: Literal["keep", "drop"] = "keep"
    """Treatment of a pair whose new response is refused by the guard: `keep` the original, or `drop` the pair."""
    verifier: RewardSection | None = None
    """Reward functions that verify a response; they get the other fields of the row as columns. Default: none."""
    verifier_minimum: float = 0.5
    """Minimum verifier score of a new response."""
    reward_model: RewardModelSection | None = None
    """Reward model of `method: reward_model`."""
    loop_repeats: int = Field(4, ge=2)
    """Number of repeats of the same text (at least 32 characters in all) at the end of a response from which it is refused as
    a loop."""

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
    """Reward functions whose mean is the quality. The mean BLEU with the held-out responses is always reported."""
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
