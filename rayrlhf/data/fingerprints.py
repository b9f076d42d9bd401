"""Fingerprints that bind a sample to the values computed for it, equal in every process."""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from rayrlhf.data.records import Rollout
from rayrlhf.data.training_batch import TrainingBatch


def response_fingerprint(rollout: Rollout) -> int:
    """Return a fingerprint of the response's tokens and of which the policy sampled."""
    digest = xxh3_64(_bytes(rollout.response_ids))
    digest.update(_bytes(rollout.action_mask))
    return digest.intdigest()


def payment_fingerprint(rollout: Rollout) -> int:
    """Return a fingerprint of the environment's rewards; 0 without any."""
    return 0 if rollout.rewards is None else xxh3_64(_bytes(rollout.rewards)).intdigest()


def reward_seal(rollout: Rollout, score: float, tokens: NDArray[np.float32] | None) -> int:
    """Return a fingerprint of a reward and the sample that it was computed for.

    Args:
        score: float32.
        tokens: float32 [R], the share of single tokens; None without any.
    """
    digest = xxh3_64(struct.pack("<3qf", *rollout.key, score))
    digest.update(_bytes(rollout.response_ids))
    if tokens is not None:
        digest.update(_bytes(tokens))
    return digest.intdigest()


def row_fingerprints(batch: TrainingBatch, rows: Iterable[int]) -> NDArray[np.uint64]:
    """Return fingerprints of rows of a training batch: tokens and all arrays, uint64 [rows].

    `TrainingBatch.select` does not change them.
    """
    found, arrays = [], list(batch.arrays.values())
    for row in rows:
        sequence = batch.sequences[row]
        digest, columns = xxh3_64(_bytes(sequence.token_ids)), sequence.response_length + 1
        for array in arrays:
            digest.update(_bytes(array[row, :columns]))
        found.append(digest.intdigest())
    return np.array(found, np.uint64)


def _bytes(array: NDArray[Any]) -> Any:
    """Return the array as a buffer, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).data
