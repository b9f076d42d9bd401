"""SFT inside Pre-SFT: always from the base model, on one of the run's datasets, with the same settings."""

from pathlib import Path

from rayrlhf.config.model import ModelSection
from rayrlhf.config.presft import PreSFTConfig
from rayrlhf.config.tuning.configs import SFTConfig
from rayrlhf.config.tuning.data import SupervisedDataSection, SupervisedDatasetSection
from rayrlhf.config.tuning.run import SupervisedEvaluationSection, TuningRunSection

MERGED = "export-merged"
"""Folder of an SFT run with adapters for its whole model."""
TEMPLATE_TOKENS = 16
"""What a chat template may close a response with."""


def sft_config(config: PreSFTConfig, folder: Path, dataset: Path, held_out: Path | None, *, longest: int) -> SFTConfig:
    """Return the configuration of one tuning.

    Args:
        config: the Pre-SFT run.
        folder: the SFT run's folder.
        dataset: what to train on.
        held_out: what to measure the loss on; none when None.
        longest: most tokens of prompt and response in any of the run's datasets.
    """
    evaluation = None if held_out is None else SupervisedDatasetSection(path=str(held_out))
    return SFTConfig(
        run=TuningRunSection(name=folder.name, root=folder.parent, seed=config.run.seed),
        model=config.model,
        data=SupervisedDataSection(
            train=SupervisedDatasetSection(path=str(dataset)),
            evaluation=evaluation,
            chat=config.data.chat,
            system_prompt=config.data.system_prompt,
            max_length=longest + TEMPLATE_TOKENS,
            overlong="truncate",
        ),
        train=config.train,
        evaluation=SupervisedEvaluationSection(generations=0),
        checkpoint=config.checkpoint,
        workers=config.workers,
    )


def tuned_model(config: PreSFTConfig, folder: Path) -> ModelSection:
    """Return where a finished tuning left its model, whole: adapters are merged for sampling."""
    export = folder / ("export" if config.model.lora is None else MERGED)
    return config.model.model_copy(update={"path": str(export), "revision": None, "lora": None})
