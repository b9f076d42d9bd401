"""Training batches of SFT samples, distillation samples and preference pairs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayrlhf.data.records import Float32, TokenSequence
from rayrlhf.data.supervised.supervised_samples import DistillationSample, PreferencePair, StepSample, SupervisedSample
from rayrlhf.data.training_batch import TrainingBatch

PAIR_MASK, CHOSEN_MASK, MARGIN, REFERENCE = "pair_mask", "chosen_mask", "margin", "reference_logprob"
DESIRABLE, BATCH_KL = "desirable", "batch_kl"
STEP_MASK, STEP_RIGHT = "step_mask", "step_right"
OPPONENT, PREFERENCE, REFERENCE_TOKENS = "opponent", "preference", "reference_logprobs"
HIDDEN, IDS, LOGPROBS = "teacher_hidden", "teacher_ids", "teacher_logprobs"
"""Arrays of preference pairs and of steps, and outputs of a distillation's teacher."""


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


def direct_preference_batch(pairs: Sequence[PreferencePair]) -> TrainingBatch:
    """Build a training batch of pairs: two adjacent rows each, reference log-probs in column 0.

    Pairs without reference log-probs get 0, which is DPO without a reference.

    Raises:
        ValueError: a response has no target token, or its first token is a target.
    """
    batch = supervised_batch([answer for pair in pairs for answer in (pair.chosen, pair.rejected)])
    pair_mask = np.zeros((len(batch), batch.width), dtype=np.bool_)
    pair_mask[::2, 0] = True
    reference = np.zeros((len(batch), batch.width), dtype=np.float32)
    reference[:, 0] = [value for pair in pairs for value in pair.reference or (0.0, 0.0)]
    chosen = batch.arrays["action_mask"].astype(np.bool_)
    chosen[1::2] = False
    arrays = dict(batch.arrays) | {PAIR_MASK: pair_mask, CHOSEN_MASK: chosen, REFERENCE: reference}
    return TrainingBatch(batch.sequences, arrays, group_size=2)


def unpaired_batch(pairs: Sequence[PreferencePair], kl: float) -> TrainingBatch:
    """Build a training batch of single answers, one row each.

    Label, reference and KL are in column 0.

    Args:
        pairs: labeled answers; the rejected one, to which the KL belongs, is left out.
        kl: nats per answer, over the whole optimizer step.

    Raises:
        ValueError: an answer has no target token, or its first token is a target.
    """
    batch = supervised_batch([pair.chosen for pair in pairs])
    shape = (len(batch), batch.width)
    first, desirable = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    first[:, 0], desirable[:, 0] = True, [bool(pair.label) for pair in pairs]
    reference, level = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    reference[:, 0], level[:, 0] = [pair.reference[0] if pair.reference else 0.0 for pair in pairs], kl
    arrays = dict(batch.arrays) | {PAIR_MASK: first, DESIRABLE: desirable, REFERENCE: reference, BATCH_KL: level}
    return TrainingBatch(batch.sequences, arrays)


def step_batch(samples: Sequence[StepSample]) -> TrainingBatch:
    """Build a training batch of labeled steps, with a value after each."""
    sequences = [step_sequence(sample) for sample in samples]
    shape = (len(samples), 1 + max(sequence.response_length for sequence in sequences))
    mask, right = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    for row, (sample, sequence) in enumerate(zip(samples, sequences, strict=True)):
        size = 1 + sequence.response_length
        mask[row, :size], right[row, :size] = sample.loss_mask[-size:], sample.right[-size:]
    return TrainingBatch(sequences, {STEP_MASK: mask, STEP_RIGHT: right})


def step_sequence(sample: StepSample) -> TokenSequence:
    """Return a response as a sequence whose first value is after its first step."""
    return TokenSequence(sample.token_ids, int(sample.loss_mask.argmax()) + 1)


def nash_batch(answers: Sequence[SupervisedSample], reference: Sequence[Float32], preference: Float32) -> TrainingBatch:
    """Build a training batch of Nash-MD, one row per response.

    Args:
        answers: the policy's responses.
        reference: log-probs of each response's target tokens by the reference.
        preference: float32 [B], probability that each is preferred to its opponent's; in column 0 of the batch.

    Raises:
        ValueError: a response has no target token, or its first token is a target.
    """
    batch = supervised_batch(answers)
    mask = batch.arrays["action_mask"].astype(np.bool_)
    known, first = np.zeros(mask.shape, dtype=np.float32), np.zeros(mask.shape, dtype=np.bool_)
    probability = np.zeros(mask.shape, dtype=np.float32)
    known[mask], first[:, 0], probability[:, 0] = np.concatenate(reference), True, preference
    arrays = dict(batch.arrays) | {PAIR_MASK: first, REFERENCE_TOKENS: known, PREFERENCE: probability}
    return TrainingBatch(batch.sequences, arrays)


def distillation_batch(samples: Sequence[DistillationSample]) -> TrainingBatch:
    """Build a training batch with the teacher's outputs at the target tokens and 0 elsewhere.

    Raises:
        ValueError: a sample has no target token, or its first token is a target.
    """
    batch = supervised_batch(samples)
    mask = batch.arrays["action_mask"]
    arrays: dict[str, NDArray[np.float32] | NDArray[np.bool_] | NDArray[np.int32]] = {"action_mask": mask.astype(np.bool_)}
    for name in samples[0].signal:
        parts = np.concatenate([sample.signal[name] for sample in samples])
        array = np.zeros((*mask.shape, parts.shape[1]), dtype=parts.dtype)
        array[mask] = parts
        arrays[name] = array
    return TrainingBatch(batch.sequences, arrays)
