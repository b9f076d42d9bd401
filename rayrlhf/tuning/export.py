"""Export of the trained model: policy, adapters, or reward model with statistics and format."""

import json
from pathlib import Path

import torch

from rayrlhf.config.tuning import RewardTrainingConfig, TuningConfig
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.engines.scoring.reward_model import STATISTICS_FILE
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.errors import AlarmError
from rayrlhf.observe.metric_names import CHANCE_LEVEL
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.tuning.held_out import PreferenceScores


def export_model(
    config: TuningConfig,
    engine: TrainEngine,
    scores: PreferenceScores | None,
    answer_format: AnswerFormat | None,
    folder: Path,
) -> None:
    """Write the engine's weights to a Hugging Face folder; every worker takes part.

    A policy with adapters writes the adapters (`rayrlhf export --merge` merges them); everything else is a whole model.

    Args:
        scores: rewards of held-out pairs, for a reward model.
        answer_format: format of the training texts, for a reward model.
        folder: path to write; an older folder is replaced.

    Raises:
        AlarmError: a reward model that is not better than chance, unless `export_anyway`.
    """
    if not isinstance(config, RewardTrainingConfig):
        if config.model.lora is not None:
            engine.export_adapters(folder)
        else:
            engine.export(folder)
        return
    if scores is not None:
        check_better_than_chance(scores, anyway=config.export_anyway)
    engine.export(folder)
    if torch.distributed.get_rank() != 0:
        return
    if answer_format is not None:
        answer_format.write(folder)
    if scores is not None:
        statistics = {"mean": scores.mean, "spread": scores.std} | scores.metrics() | scores.details()
        write_atomically(folder / STATISTICS_FILE, json.dumps(statistics, indent=1))


def check_better_than_chance(scores: PreferenceScores, *, anyway: bool) -> None:
    """Refuse a reward model that is no better than chance.

    The test is a one-sided binomial test at `CHANCE_LEVEL`.

    Raises:
        AlarmError: with accuracy, pairs and probability.
    """
    if anyway or scores.chance < CHANCE_LEVEL:
        return
    pairs = len(scores.chosen)
    correct = int((scores.differences > 0).sum())
    raise AlarmError(
        f"the reward model prefers the better answer in {correct} of {pairs} held-out pairs, which fair coins reach with "
        f"probability {scores.chance:.2f} (expected below {CHANCE_LEVEL}): not exported; train longer, give more or cleaner "
        "pairs, or set export_anyway=true"
    )
