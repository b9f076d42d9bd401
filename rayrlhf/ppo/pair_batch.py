"""Training batch of a step: its samples, or for online DPO its pairs.

In XPO and Nash-MD the odd samples of a prompt are those of the policy's opponent (`rayrlhf.algorithms.opponents`).
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from rayrlhf.algorithms.opponents import opponent_pairs
from rayrlhf.algorithms.preference_pairs import ranked_pairs
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Bool, SampleKey
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.train.supervised_batches import OPPONENT, direct_preference_batch, nash_batch
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
    section = config.algorithm.online_dpo
    if section is None:
        return TrainedBatch(experience.batch, experience.keys, experience.learnable_groups)
    return compared_batch(experience) if section.variant == "nash_md" else pair_batch(experience, section.variant)


def pair_batch(experience: Experience, variant: str = "online_dpo") -> TrainedBatch:
    """Return a step's pairs, the better sample of each first.

    Pairs without tokens to train on are left out. Without any pair it is the step's own batch, and no groups.
    """
    arrays = experience.batch.arrays
    mask = arrays["action_mask"].astype(np.bool_)
    reference = np.where(mask, arrays["ref_logprobs"], 0.0).sum(1, dtype=np.float64)
    pairs, keys = [], []
    for number, (better, worse) in enumerate(_ranked(experience, variant)):
        if mask[better].any() and mask[worse].any():
            known = float(reference[better]), float(reference[worse])
            answers = _answer(experience, better, mask[better]), _answer(experience, worse, mask[worse])
            pairs.append(PreferencePair(*answers, None, number, known))
            keys += [experience.keys[better], experience.keys[worse]]
    if not pairs:
        return TrainedBatch(experience.batch, experience.keys, [])
    groups = [[2 * number, 2 * number + 1] for number in range(len(pairs))]
    batch = direct_preference_batch(pairs)
    if variant == "xpo":
        opponent = np.zeros((len(batch), batch.width), dtype=np.float32)
        opponent[:, 0] = [key.sample % 2 for key in keys]
        batch = replace(batch, arrays={**batch.arrays, OPPONENT: opponent})
    return TrainedBatch(batch, keys, groups)


def compared_batch(experience: Experience) -> TrainedBatch:
    """Return the policy's samples for Nash-MD, with their probabilities to be preferred."""
    arrays = experience.batch.arrays
    mask = arrays["action_mask"].astype(np.bool_)
    pairs = [(own, other) for own, other in opponent_pairs(experience.scores, *_numbers(experience)) if mask[own].any()]
    if not pairs:
        return TrainedBatch(experience.batch, experience.keys, [])
    rows, others = (list(part) for part in zip(*pairs, strict=True))
    preference = torch.sigmoid(experience.scores[rows] - experience.scores[others]).numpy()
    answers = [_answer(experience, row, mask[row]) for row in rows]
    batch = nash_batch(answers, [arrays["ref_logprobs"][row][mask[row]] for row in rows], preference)
    return TrainedBatch(batch, [experience.keys[row] for row in rows], [[row] for row in range(len(rows))])


def _ranked(experience: Experience, variant: str) -> list[tuple[int, int]]:
    """Return pairs of rows, the better one first."""
    prompts, samples = _numbers(experience)
    scores = experience.scores
    if variant == "online_dpo":
        return ranked_pairs(scores, prompts)
    compared = opponent_pairs(scores, prompts, samples)
    found = [(own, other) if scores[own] > scores[other] else (other, own) for own, other in compared]
    return [(better, worse) for better, worse in found if scores[better] > scores[worse]]


def _numbers(experience: Experience) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompt and sample number of each row, int64 [B]."""
    prompts, samples = ([getattr(key, name) for key in experience.keys] for name in ("prompt", "sample"))
    return torch.tensor(prompts), torch.tensor(samples)


def _answer(experience: Experience, row: int, mask: Bool) -> SupervisedSample:
    sequence = experience.batch.sequences[row]
    taken = np.zeros(len(sequence.token_ids), np.bool_)
    taken[sequence.prompt_length :] = mask[: sequence.response_length]
    return SupervisedSample(sequence.token_ids, taken, row)
