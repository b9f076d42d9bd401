"""Training batch of the train engines: token sequences and aligned per-token arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayrlhf.data.records import TokenSequence


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Token sequences and named arrays [B, T], right-padded; column j is response token j.

    T is at least the longest response; one more column holds the slot after the last token, which TRL modern rewards.

    Attributes:
        sequences: B token sequences.
        arrays: float32 or bool [B, T] each; teacher outputs have a further dimension. The objectives read `old_logprobs`,
            `advantages`, `action_mask` (policy), `old_values`, `returns`, `value_mask` (critic), and if configured
            `ref_logprobs` and `importance_weights`. Masked-out entries may have any value, NaN included.
        group_size: consecutive rows that must share a micro-batch, because the objective compares them; 2 for pairs.
        cause: first non-finite number that the arrays were computed from, in words; empty if all are finite.
    """

    sequences: Sequence[TokenSequence]
    arrays: Mapping[str, NDArray[np.float32] | NDArray[np.bool_] | NDArray[np.int32]]
    group_size: int = 1
    cause: str = ""

    def __post_init__(self) -> None:
        if not self.sequences or not self.arrays:
            raise ValueError("a training batch needs sequences and arrays")
        widths = {array.shape[1] for array in self.arrays.values() if array.ndim == 2}
        rows = {array.shape[0] for array in self.arrays.values()}
        longest = max(sequence.response_length for sequence in self.sequences)
        if len(widths) != 1 or rows != {len(self.sequences)}:
            shapes = {name: array.shape for name, array in self.arrays.items()}
            raise ValueError(f"arrays must all be [{len(self.sequences)}, T], not {shapes}")
        if max(widths) < longest:
            raise ValueError(f"arrays have {max(widths)} columns, the longest response {longest} tokens")

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and response."""
        return [len(sequence.token_ids) for sequence in self.sequences]

    @property
    def width(self) -> int:
        """T, the number of columns."""
        return int(next(iter(self.arrays.values())).shape[1])

    def select(self, rows: Sequence[int]) -> "TrainingBatch":
        """Return the batch of the given rows, in this order, with unused columns removed."""
        sequences = [self.sequences[row] for row in rows]
        width = min(self.width, 1 + max(sequence.response_length for sequence in sequences))
        arrays = {name: array[list(rows), :width] for name, array in self.arrays.items()}
        return TrainingBatch(sequences, arrays, self.group_size, self.cause)
