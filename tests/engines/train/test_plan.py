"""How an optimizer step is shared out where rows belong together, and where they lie end to end."""

from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.train.plan import split_mini_batch

LENGTHS = st.lists(st.integers(1, 60), min_size=2, max_size=40)


def real_rows(shares):
    return sorted(row for share in shares for batch in share if batch.weight for row in batch.rows)


@given(LENGTHS, st.integers(1, 4), st.booleans(), st.integers(60, 300))
def test_pairs_stay_together_and_every_row_is_used_once(lengths, ranks, packing, budget):
    lengths = lengths[: len(lengths) // 2 * 2]
    train = TrainSection(micro_batch_tokens=budget)
    shares = split_mini_batch(range(len(lengths)), lengths, ranks, train, ParitySection(), group_size=2, packing=packing)
    assert real_rows(shares) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        for batch in share:
            pairs = list(zip(batch.rows[::2], batch.rows[1::2], strict=True))
            assert all(first % 2 == 0 and second == first + 1 for first, second in pairs)


@given(LENGTHS, st.integers(1, 4), st.integers(60, 300))
def test_packs_hold_no_more_than_their_size_and_padded_batches_neither(lengths, ranks, budget):
    train = TrainSection(micro_batch_tokens=budget)
    for packing in (True, False):
        shares = split_mini_batch(range(len(lengths)), lengths, ranks, train, ParitySection(), packing=packing)
        assert real_rows(shares) == list(range(len(lengths)))
        for batch in (batch for share in shares for batch in share):
            own = [lengths[row] for row in batch.rows]
            assert (sum(own) if packing else len(own) * max(own)) <= budget
