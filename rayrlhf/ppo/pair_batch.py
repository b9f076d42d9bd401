"""Training batch of a step: its samples, or for online DPO its pairs."""

from typing import NamedTuple

import numpy as np
import torch

from rayrlhf.algorithms.preference_pairs import ranked_pairs
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Bool, SampleKey
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.train.supervised_batches import direct_preference_batch
from rayrlhf.ppo.experience import Experience


class TrainedBatch(NamedTuple):
    """Rows that the optimizer steps read.

    Attributes:
        keys: sample of each row.
        groups: rows to train on, by prompt or pair.
    """

    batch: TrainingBatch
    keys: list[SampleKey]
    groups: list[list[int]]


def trained_batch(config: PPOConfig, experience: Experience) -> TrainedBatch:
    """Return the rows that the optimizer steps of a step read."""
    if config.algorithm.online_dpo is not None:
        return pair_batch(experience)
    return TrainedBatch(experience.batch, experience.keys, experience.learnable_groups)


def pair_batch(experience: Experience) -> TrainedBatch:
    """Return a step's pairs, the better sample of each first.

    Pairs without tokens to train on are left out. Without any pair it is the step's own batch, and no groups.
    """
    arrays = experience.batch.arrays
    mask = arrays["action_mask"].astype(np.bool_)
    reference = np.where(mask, arrays["ref_logprobs"], 0.0).sum(1, dtype=np.float64)
    pairs, keys = [], []
    prompts = torch.tensor([key.prompt for key in experience.keys])
    for number, (better, worse) in enumerate(ranked_pairs(experience.scores, prompts)):
        if mask[better].any() and mask[worse].any():
            known = float(reference[better]), float(reference[worse])
            answers = _answer(experience, better, mask[better]), _answer(experience, worse, mask[worse])
            pairs.append(PreferencePair(*answers, None, number, known))
            keys += [experience.keys[better], experience.keys[worse]]
    if not pairs:
        return TrainedBatch(experience.batch, experience.keys, [])
    groups = [[2 * number, 2 * number + 1] for number in range(len(pairs))]
    return TrainedBatch(direct_preference_batch(pairs), keys, groups)


def _answer(experience: Experience, row: int, mask: Bool) -> SupervisedSample:
    sequence = experience.batch.sequences[row]
    taken = np.zeros(len(sequence.token_ids), np.bool_)
    taken[sequence.prompt_length :] = mask[: sequence.response_length]
    return SupervisedSample(sequence.token_ids, taken, row)
