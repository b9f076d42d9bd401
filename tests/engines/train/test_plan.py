"""How an optimizer step is shared out where rows belong together, and where they lie end to end."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.train import TrainSection
from rayrlhf.data.prefix_tree import prefix_tree
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


def prompts_with_responses(count, samples, generator):
    prompts = [generator.integers(0, 99, 30) for _ in range(count)]
    return [
        np.concatenate([prompt, generator.integers(0, 99, generator.integers(1, 20))]).astype(np.int32)
        for prompt in prompts
        for _ in range(samples)
    ]


@given(st.integers(1, 6), st.sampled_from([2, 4]), st.integers(1, 4), st.integers(60, 300), st.integers(0, 9))
def test_groups_that_share_a_prompt_cost_it_once_and_every_row_is_used_once(count, samples, ranks, budget, seed):
    tokens = prompts_with_responses(count, samples, np.random.default_rng(seed))
    lengths, train = [len(one) for one in tokens], TrainSection(micro_batch_tokens=budget)
    shares = split_mini_batch(range(len(tokens)), lengths, ranks, train, ParitySection(), group_size=2, tokens=tokens)
    assert real_rows(shares) == list(range(len(tokens)))
    assert len({len(share) for share in shares}) == 1
    for batch in (batch for share in shares for batch in share if batch.weight):
        assert batch.shared
        assert all(batch.rows[index] + 1 == batch.rows[index + 1] for index in range(0, len(batch.rows), 2))
        assert len(batch.rows) == 2 or len(prefix_tree([tokens[row] for row in batch.rows]).token_ids) <= budget


def test_micro_batches_of_trl_and_samples_without_a_common_beginning_are_left_as_they_are():
    tokens = prompts_with_responses(3, 2, np.random.default_rng(0))
    lengths, train = [len(one) for one in tokens], TrainSection(micro_batch_tokens=100)
    for parity in (ParitySection(mini_batch_means=True), ParitySection(no_accumulation=True)):
        assert split_mini_batch(range(6), lengths, 1, train, parity, tokens=tokens) == split_mini_batch(
            range(6), lengths, 1, train, parity
        )
    apart = [one[index:] for index, one in enumerate(tokens)]
    lengths = [len(one) for one in apart]
    assert split_mini_batch(range(6), lengths, 2, train, ParitySection(), tokens=apart) == split_mini_batch(
        range(6), lengths, 2, train, ParitySection()
    )


def test_a_micro_batch_size_counts_pairs_and_leaves_the_token_budget_out_with_shared_prompts_too():
    tokens = prompts_with_responses(4, 2, np.random.default_rng(0))
    lengths, train = [len(one) for one in tokens], TrainSection(micro_batch_tokens=10, micro_batch_size=2)
    for shared in (None, tokens):
        ((*batches,),) = split_mini_batch(range(8), lengths, 1, train, ParitySection(), group_size=2, tokens=shared)
        assert [(len(batch.rows), batch.shared) for batch in batches] == [(4, shared is not None)] * 2
