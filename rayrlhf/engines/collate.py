"""Sequences of any length into one right-padded batch, and flat network outputs back to where they belong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayrlhf.data.records import Sequence as TokenSequence
from rayrlhf.models.network import Positions


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A micro-batch on its device.

    Attributes:
        input_ids: int64 [B, L].
        positions: where the network reads it.
        logprob_slots: int64 [N], the cell b * T + j of a [B, T] table that each log-prob belongs to.
        value_slots: int64 [M], likewise for values.
        shape: (B, T).
    """

    input_ids: Tensor
    positions: Positions
    logprob_slots: Tensor
    value_slots: Tensor
    shape: tuple[int, int]

    def table(self, flat: Tensor, slots: Tensor) -> Tensor:
        """Return flat values [N] as a table [B, T], 0 in the cells without one; gradients flow back."""
        rows, columns = self.shape
        return flat.new_zeros(rows * columns).index_copy(0, slots, flat).view(rows, columns)


def collate(sequences: Sequence[TokenSequence], width: int, device: torch.device) -> PaddedBatch:
    """Pad sequences on the right.

    Args:
        sequences: B of them.
        width: T, columns of the tables; a value after the last token is read only where it has a column.
        device: where the tensors go.
    """
    longest = max(len(sequence.token_ids) for sequence in sequences)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    predictors, targets, values, logprob_slots, value_slots = [], [], [], [], []
    for row, sequence in enumerate(sequences):
        length, prompt, response = len(sequence.token_ids), sequence.prompt_length, sequence.response_length
        input_ids[row, :length] = sequence.token_ids
        start, columns = row * longest + prompt - 1, np.arange(min(response + 1, width))
        predictors.append(start + np.arange(response))
        targets.append(sequence.token_ids[prompt:])
        values.append(start + columns)
        logprob_slots.append(row * width + np.arange(response))
        value_slots.append(row * width + columns)

    def tensor(parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return PaddedBatch(
        torch.from_numpy(input_ids).to(device),
        Positions(tensor(predictors), tensor(targets), tensor(values), [len(sequence.token_ids) for sequence in sequences]),
        tensor(logprob_slots),
        tensor(value_slots),
        (len(sequences), width),
    )
