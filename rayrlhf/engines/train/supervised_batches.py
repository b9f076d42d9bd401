"""Training batches of SFT samples and preference pairs."""

from collections.abc import Sequence

import numpy as np

from rayrlhf.data.records import TokenSequence
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.preference import MARGIN, PAIR_MASK


def supervised_batch(samples: Sequence[SupervisedSample]) -> TrainingBatch:
    """Return samples as a training batch.

    `action_mask` is True on the target tokens, at any position.

    Raises:
        ValueError: a sample has no target token, or its first token is a target.
    """
    sequences = [supervised_sequence(sample) for sample in samples]
    mask = np.zeros((len(samples), max(sequence.response_length for sequence in sequences)), dtype=np.bool_)
    for row, (sample, sequence) in enumerate(zip(samples, sequences, strict=True)):
        mask[row, : sequence.response_length] = sample.loss_mask[sequence.prompt_length :]
    return TrainingBatch(sequences, {"action_mask": mask})


def supervised_sequence(sample: SupervisedSample) -> TokenSequence:
    """Return a sample as a sequence whose response begins with the first target token.

    Raises:
        ValueError: see `supervised_batch`.
    """
    targets = np.flatnonzero(sample.loss_mask)
    if not len(targets) or targets[0] == 0:
        raise ValueError(f"row {sample.row}: expected targets, none of them the first token")
    return TokenSequence(sample.token_ids, int(targets[0]))


def preference_batch(pairs: Sequence[PreferencePair]) -> TrainingBatch:
    """Return pairs as a training batch of two adjacent rows each.

    Each row has one value, after its last token.
    """
    sequences = [answer_sequence(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    margins = np.repeat([pair.margin or 0.0 for pair in pairs], 2).astype(np.float32)
    first = np.tile([True, False], len(pairs))
    return TrainingBatch(sequences, {PAIR_MASK: first[:, None], MARGIN: margins[:, None]}, group_size=2)


def answer_sequence(answer: SupervisedSample) -> TokenSequence:
    """Return a prompt and response as a sequence with one value, after the last token."""
    return TokenSequence(answer.token_ids, len(answer.token_ids))
