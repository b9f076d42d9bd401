"""Rows that are cut for some ranks are recut for others; `test_train_distributed` moves whole states."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.engines.train.backends.deepspeed_resize import recut_each, recut_row

lengths = st.lists(st.integers(0, 12), min_size=1, max_size=6)
counts = st.integers(1, 5)


def cut(row: torch.Tensor, ranks: int, multiple: int = 1) -> list[torch.Tensor]:
    """The row padded to equal pieces, as ZeRO cuts it."""
    size = -(-len(row) // (ranks * multiple)) * multiple
    return list(torch.cat([row, row.new_full((size * ranks - len(row),), torch.nan)]).split(size)) if size else [row] * ranks


@given(st.integers(1, 40), counts, counts, st.sampled_from([1, 2]))
def test_a_row_cut_for_some_ranks_is_recut_for_others(length, before, after, multiple):
    row = torch.arange(length, dtype=torch.float32) + 1
    size = -(-length // (after * multiple)) * multiple
    pieces = [recut_row(cut(row, before, multiple), length, rank, size) for rank in range(after)]
    assert [len(piece) for piece in pieces] == [size] * after
    np.testing.assert_array_equal(torch.cat(pieces), np.pad(row.numpy(), (0, size * after - length)))


@given(lengths, counts, counts)
def test_parameters_cut_each_by_itself_are_recut_each_by_itself(sizes, before, after):
    whole = [torch.arange(size, dtype=torch.float32) + 100 * index for index, size in enumerate(sizes)]
    saved = [torch.cat([cut(value, before)[rank] for value in whole]) for rank in range(before)]
    again = [recut_each(saved, sizes, rank, after) for rank in range(after)]
    for index, value in enumerate(whole):
        np.testing.assert_array_equal(torch.cat([pieces[index] for pieces in again])[: len(value)], value)
