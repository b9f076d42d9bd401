"""A prefix tree holds every sequence, and no token twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.prefix_tree import in_prefix_order, prefix_tree

# Three tokens, so that sequences often share a beginning, end inside another one, or are equal.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12).map(
    lambda rows: [np.array(row, dtype=np.int32) for row in rows]
)


def distinct_tokens(sequences):
    return len({tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))})


@given(SEQUENCES)
def test_every_sequence_is_a_path_from_a_root_and_every_token_is_there_once(sequences):
    tree = prefix_tree(sequences)
    assert len(tree.token_ids) == sum(tree.lengths) == distinct_tokens(sequences)
    assert min(tree.lengths) >= 1
    ends = np.cumsum(tree.lengths)
    chains = []
    for number, parent in enumerate(tree.parents):
        assert parent < number
        own = np.arange(ends[number] - tree.lengths[number], ends[number])
        chains.append(np.concatenate([chains[parent], own]) if parent >= 0 else own)
    for sequence, places in zip(sequences, tree.places, strict=True):
        assert np.array_equal(tree.token_ids[places], sequence)
        segment = int(np.searchsorted(ends, places[-1], side="right"))
        assert np.array_equal(chains[segment], places)


def test_a_branch_inside_a_response_and_a_repetition_make_the_expected_segments():
    rows = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6], [1]]
    tree = prefix_tree([np.array(row, dtype=np.int32) for row in rows])
    assert (tree.lengths, tree.parents) == ([1, 2, 1, 1, 1], [-1, -1, 1, 2, 2])
    assert tree.token_ids.tolist() == [1, 5, 6, 7, 8, 9]
    assert [places.tolist() for places in tree.places] == [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [1, 2], [0]]


def test_a_long_chain_of_prefixes_needs_no_recursion():
    whole = np.arange(3000, dtype=np.int32)
    tree = prefix_tree([whole[:end] for end in range(1, 3001)])
    assert (len(tree.token_ids), tree.parents) == (3000, list(range(-1, 2999)))


@given(SEQUENCES, st.integers(1, 3), st.integers(1, 20), st.sampled_from([None, 2, 3]), st.integers(1, 2))
def test_batches_keep_groups_whole_and_stay_within_the_budget(sequences, ranks, budget, most, group_size):
    sequences = (sequences * group_size)[: len(sequences) // group_size * group_size or group_size]
    order = in_prefix_order(sequences, group_size)
    parts = order.parts(ranks)
    assert [number for part in parts for number in part] == list(range(len(order.groups)))
    batches = [batch for part in parts for batch in order.micro_batches(part, budget, most)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(sequences)))
    for batch in batches:
        groups = [batch[start : start + group_size] for start in range(0, len(batch), group_size)]
        assert all(group in order.groups for group in groups)
        if len(groups) > 1:
            assert distinct_tokens([sequences[row] for row in batch]) <= budget
            assert most is None or len(batch) <= most


@given(SEQUENCES)
def test_tokens_of_the_order_are_those_of_the_tree(sequences):
    order = in_prefix_order(sequences)
    distinct = distinct_tokens(sequences)
    assert sum(order.distinct) - sum(order.shared) == distinct
    tokens, branches = sum(map(len, sequences)), len(sequences) - len({int(tokens[0]) for tokens in sequences})
    assert order.branches == branches
    assert order.pays == (distinct <= 0.97 * tokens and tokens - distinct >= 16 * branches)


def test_ranks_get_about_equal_shares_and_cut_few_groups():
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 99, 50).astype(np.int32) for _ in range(8)]
    rows = [np.concatenate([prompt, generator.integers(0, 99, 20).astype(np.int32)]) for prompt in prompts for _ in range(4)]
    order = in_prefix_order(rows)
    parts = order.parts(2)
    totals = [len(prefix_tree([rows[row] for number in part for row in order.groups[number]]).token_ids) for part in parts]
    assert abs(totals[0] - totals[1]) <= 70
    assert sum(totals) <= 8 * (50 + 4 * 20) + 50


def prompt_with_responses(prompt, samples, response):
    """Rows of one prompt whose responses differ from their first token on."""
    return [np.concatenate([np.arange(prompt), np.full(response, prompt + row)]).astype(np.int32) for row in range(samples)]


def test_short_prompts_are_computed_for_each_sample():
    assert [in_prefix_order(prompt_with_responses(size, 8, 4)).pays for size in (15, 16)] == [False, True]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_cut_prompt_counts_on_every_rank_that_computes_it(ranks):
    order = in_prefix_order(prompt_with_responses(512, 16, 128))
    assert [len(part) for part in order.parts(ranks)] == [16 // ranks] * ranks


@given(SEQUENCES, st.integers(1, 4))
def test_no_other_cut_has_a_smaller_largest_share(sequences, ranks):
    order = in_prefix_order(sequences)
    rows = [sequences[group[0]] for group in order.groups]

    def largest(start, count):
        if count == 1:
            return distinct_tokens(rows[start:])
        return min(max(distinct_tokens(rows[start:end]), largest(end, count - 1)) for end in range(start, len(rows) + 1))

    ranks = min(ranks, 3 if len(rows) > 6 else 4)
    assert max(distinct_tokens(rows[part.start : part.stop]) for part in order.parts(ranks)) == largest(0, ranks)


@given(SEQUENCES)
def test_no_run_of_rows_needs_a_larger_mask_than_the_order_says(sequences):
    order = in_prefix_order(sequences)
    found = [0]
    for start in range(len(sequences)):
        for end in range(start + 1, len(sequences) + 1):
            tree = prefix_tree([sequences[group[0]] for group in order.groups[start:end]])
            chains = []
            for length, parent in zip(tree.lengths, tree.parents, strict=True):
                chains.append(length + (chains[parent] if parent >= 0 else 0))
                found += [length * chains[-1]] if parent >= 0 else []
    assert max(found) == order.largest_mask


def test_long_responses_to_a_short_prompt_are_computed_apart():
    assert in_prefix_order(prompt_with_responses(1000, 4, 3500)).pays
    assert not in_prefix_order(prompt_with_responses(1000, 4, 16000)).pays
    pairs = in_prefix_order(prompt_with_responses(1000, 2, 16000), group_size=2)
    assert not pairs.pays
