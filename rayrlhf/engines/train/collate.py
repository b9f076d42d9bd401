"""Collation of sequences into one batch: right-padded, packed, or as a prefix tree.

Flat network outputs are scattered back to tables [B, T].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.data.expert_ids import OWN_CHOICE, widen
from rayrlhf.data.prefix_tree import prefix_tree
from rayrlhf.data.records import TokenSequence
from rayrlhf.models.network_io import Positions


@dataclass(frozen=True, slots=True)
class CollatedBatch:
    """Micro-batch on its device.

    Attributes:
        input_ids: int64 [B, L]; [1, L] if packed or shared.
        positions: positions for the network to read.
        logprob_slots: int64 [N], the cell b * T + j of a [B, T] table for each log-prob.
        value_slots: int64 [M], likewise for values.
    """

    input_ids: Tensor
    positions: Positions
    logprob_slots: Tensor
    value_slots: Tensor
    shape: tuple[int, int]

    def table(self, flat: Tensor, slots: Tensor) -> Tensor:
        """Scatter flat values [N] into a table [B, T], 0 elsewhere; gradients flow back."""
        rows, columns = self.shape
        return flat.new_zeros(rows * columns).index_copy(0, slots, flat).view(rows, columns)


def collate(
    sequences: Sequence[TokenSequence],
    width: int,
    device: torch.device,
    *,
    targets_mask: NDArray[np.bool_] | None = None,
    packed: bool = False,
    shared: bool = False,
) -> CollatedBatch:
    """Pad sequences on the right, pack them, or compute their common beginnings once.

    Outputs are per sequence in any layout: a shared position is read once for each sequence that has it, and its gradient is
    the sum over them.

    Args:
        width: T, columns of the tables; the value after the last token is computed only if it has a column.
        targets_mask: bool [B, T], response tokens to compute log-probs of; None computes all.
        packed: end to end in one row.
        shared: as a prefix tree in one row.
    """
    if shared:
        tree = prefix_tree([sequence.token_ids for sequence in sequences])
        lengths, parents, places, input_ids = tree.lengths, tree.parents, tree.places, tree.token_ids[None]
    else:
        lengths, parents = [len(sequence.token_ids) for sequence in sequences], None
        longest = sum(lengths) if packed else max(lengths)
        starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(sequences)) * longest
        places = [start + np.arange(length) for start, length in zip(starts, lengths, strict=True)]
        input_ids = np.zeros((1 if packed else len(sequences), longest), dtype=np.int64)
        for sequence, own in zip(sequences, places, strict=True):
            input_ids.reshape(-1)[own] = sequence.token_ids
    experts = _experts(sequences, places, input_ids.size)
    predictors, targets, values, logprob_slots, value_slots = [], [], [], [], []
    for row, sequence in enumerate(sequences):
        prompt, response = sequence.prompt_length, sequence.response_length
        columns = np.arange(min(response + 1, width))
        wanted = np.arange(response) if targets_mask is None else np.flatnonzero(targets_mask[row, :response])
        predictors.append(places[row][prompt - 1 + wanted])
        targets.append(sequence.token_ids[prompt + wanted])
        values.append(places[row][prompt - 1 + columns])
        logprob_slots.append(row * width + wanted)
        value_slots.append(row * width + columns)

    def tensor(parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return CollatedBatch(
        torch.from_numpy(input_ids).to(device),
        Positions(
            *(tensor(predictors), tensor(targets), tensor(values)),
            lengths,
            packed or shared,
            parents,
            places,
            None if experts is None else torch.from_numpy(experts).to(device),
        ),
        tensor(logprob_slots),
        tensor(value_slots),
        (len(sequences), width),
    )


def _experts(sequences: Sequence[TokenSequence], places: Sequence[NDArray[np.int64]], size: int) -> NDArray[np.int16] | None:
    """Return the experts to replay at each place of a flattened batch, or None."""
    known = [(own, one.experts) for own, one in zip(places, sequences, strict=True) if one.experts is not None]
    if not known:
        return None
    experts = np.full((size, *known[0][1].shape[1:]), OWN_CHOICE, np.int16)
    for own, ids in known:
        experts[own] = widen(ids)
    return experts
