"""Root configurations of SFT, reward models and DPO, and checks across their sections."""

from typing import Self

from pydantic import model_validator

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import Section
from rayrlhf.config.tuning.data import DistillationDataSection, PreferenceDataSection, SupervisedDataSection
from rayrlhf.config.tuning.run import (
    DirectPreferenceRunSection,
    RewardRunSection,
    SupervisedCheckpointSection,
    SupervisedEvaluationSection,
    TuningCheckpointSection,
    TuningEvaluationSection,
    TuningObserveSection,
    TuningRunSection,
    WorkersSection,
)
from rayrlhf.config.tuning.train import (
    DirectPreferenceTrainSection,
    DistillationTrainSection,
    RewardTrainSection,
    SupervisedTrainSection,
    TuningTrainSection,
)


class SFTConfig(Section):
    """Configuration of `rayrlhf sft`."""

    run: TuningRunSection = TuningRunSection()
    model: ModelSection
    data: SupervisedDataSection
    train: SupervisedTrainSection = SupervisedTrainSection()
    evaluation: SupervisedEvaluationSection = SupervisedEvaluationSection()
    checkpoint: SupervisedCheckpointSection = SupervisedCheckpointSection()
    workers: WorkersSection = WorkersSection()
    observe: TuningObserveSection = TuningObserveSection()

    @property
    def has_evaluation(self) -> bool:
        """True with held-out samples."""
        return self.data.evaluation is not None or self.data.held_out_share > 0

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        _check_evaluation(self.has_evaluation, self.evaluation, self.checkpoint)
        _check_batch(self.train, self.workers, self.data.max_length, 1)
        return self


class DistillationConfig(SFTConfig):
    """Training part of `rayrlhf icl distill`, after its data is built."""

    data: DistillationDataSection
    train: DistillationTrainSection = DistillationTrainSection()


class RewardTrainingConfig(Section):
    """Configuration of `rayrlhf reward`."""

    run: RewardRunSection = RewardRunSection()
    model: ModelSection
    data: PreferenceDataSection
    train: RewardTrainSection = RewardTrainSection()
    evaluation: TuningEvaluationSection = TuningEvaluationSection()
    checkpoint: TuningCheckpointSection = TuningCheckpointSection()
    workers: WorkersSection = WorkersSection()
    observe: TuningObserveSection = TuningObserveSection()
    export_anyway: bool = False
    """Export the model even if its held-out accuracy is not better than chance."""

    @property
    def has_evaluation(self) -> bool:
        """True with held-out pairs: always, unless the share rounds to none."""
        return self.data.evaluation is not None or self.data.held_out_share > 0

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        _check_evaluation(self.has_evaluation, self.evaluation, self.checkpoint)
        _check_batch(self.train, self.workers, self.data.max_length, 2)
        return self


class DPOConfig(Section):
    """Configuration of `rayrlhf dpo`."""

    run: DirectPreferenceRunSection = DirectPreferenceRunSection()
    model: ModelSection
    data: PreferenceDataSection
    train: DirectPreferenceTrainSection = DirectPreferenceTrainSection()
    evaluation: TuningEvaluationSection = TuningEvaluationSection()
    checkpoint: TuningCheckpointSection = TuningCheckpointSection()
    workers: WorkersSection = WorkersSection()
    observe: TuningObserveSection = TuningObserveSection()

    @property
    def has_evaluation(self) -> bool:
        """True with held-out pairs."""
        return self.data.evaluation is not None or self.data.held_out_share > 0

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        _check_evaluation(self.has_evaluation, self.evaluation, self.checkpoint)
        _check_batch(self.train, self.workers, self.data.max_length, 2)
        if self.data.overlong == "truncate":
            raise ValueError(
                "data.overlong truncate keeps the end of a pair, where DPO needs its prompt: expected error or drop"
            )
        return self


TuningConfig = SFTConfig | RewardTrainingConfig | DPOConfig
"""Configurations that the tuning loop runs."""


def _check_evaluation(has_evaluation: bool, section: TuningEvaluationSection, checkpoint: TuningCheckpointSection) -> None:
    """Refuse settings that need held-out rows if there are none."""
    if has_evaluation:
        return
    for key, value in (("evaluation.every", section.every), ("checkpoint.best_metric", checkpoint.best_metric)):
        if value:
            raise ValueError(f"{key} {value} needs held-out rows: set data.evaluation or data.evaluation_share")


def _check_batch(train: TuningTrainSection, workers: WorkersSection, max_length: int, sequences: int) -> None:
    """Refuse an optimizer step smaller than one sample per worker or the longest sample."""
    if train.samples_per_step is not None and train.samples_per_step < workers.most:
        raise ValueError(f"train.batch_size {train.samples_per_step} is smaller than workers.count {workers.most}")
    if train.batch_tokens is not None and train.batch_tokens < sequences * max_length:
        both = " for chosen and rejected" if sequences == 2 else ""
        raise ValueError(f"train.batch_tokens {train.batch_tokens} cannot hold data.max_length {max_length}{both}")
    if train.packing and train.micro_batch_tokens < sequences * max_length:
        both = " for chosen and rejected" if sequences == 2 else ""
        raise ValueError(f"train.micro_batch_tokens {train.micro_batch_tokens} cannot hold data.max_length {max_length}{both}")
