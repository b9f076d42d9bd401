"""SFT configurations of Pre-SFT: always from the base model, with the same settings."""

from pathlib import Path

from rayrlhf.config.data import SupervisedDataSection, SupervisedDatasetSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.config.tuning import SFTConfig, SupervisedEvaluationSection, TuningRunSection
from rayrlhf.models.model_path import EXPORT, MERGED

TEMPLATE_TOKENS = 16
"""Maximum tokens that a chat template appends to a response."""


def sft_config(config: PreSFTConfig, folder: Path, dataset: Path, held_out: Path | None, *, longest: int) -> SFTConfig:
    """Return the configuration of one SFT run.

    Args:
        config: the Pre-SFT run.
        folder: folder of the SFT run.
        dataset: training data.
        held_out: data for the evaluation loss, or None.
        longest: maximum tokens of prompt and response in any dataset of the run.
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
    """Return the exported model of a finished SFT run, with merged adapters."""
    export = folder / (EXPORT if config.model.lora is None else MERGED)
    return config.model.model_copy(update={"path": str(export), "revision": None, "lora": None})
