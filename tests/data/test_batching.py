"""Micro-batches and rank shares: every sample once, budgets kept, as little padding and as equal parts as can be."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.batching import SPLIT_TOKENS, balance, micro_batches, padding_share

lengths_lists = st.lists(st.integers(1, 200), max_size=60)


def flat(batches: list[list[int]]) -> list[int]:
    return sorted(itertools.chain.from_iterable(batches))


def padded(lengths: list[int], batch: list[int]) -> int:
    return len(batch) * max(lengths[i] for i in batch)


@given(lengths_lists, st.integers(1, 500), st.none() | st.integers(1, 7))
def test_micro_batches_hold_every_sample_once_within_the_budget(lengths, budget, most):
    batches = micro_batches(lengths, budget, max_samples=most)
    assert flat(batches) == list(range(len(lengths)))
    for batch in batches:
        assert padded(lengths, batch) <= budget or len(batch) == 1
        assert most is None or len(batch) <= most


def cost(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(padded(lengths, batch) + SPLIT_TOKENS for batch in batches)


def least_cost(lengths: list[int], budget: int) -> int:
    """The smallest cost over all partitions, by trying them all."""

    def search(rest: tuple[int, ...]) -> int:
        if not rest:
            return 0
        first, others = rest[0], rest[1:]
        found = []
        for size in range(len(others) + 1):
            for companions in itertools.combinations(range(len(others)), size):
                batch = [first, *(others[i] for i in companions)]
                if len(batch) == 1 or len(batch) * max(batch) <= budget:
                    left = tuple(x for i, x in enumerate(others) if i not in companions)
                    found.append(len(batch) * max(batch) + SPLIT_TOKENS + search(left))
        return min(found)

    return search(tuple(lengths))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=7), st.integers(1, 1000))
def test_no_split_into_micro_batches_is_cheaper(lengths, budget):
    assert cost(lengths, micro_batches(lengths, budget)) == least_cost(lengths, budget)


def test_samples_of_like_length_share_a_batch_where_padding_would_cost_more_than_another_batch():
    assert micro_batches([60, 200, 60, 180, 80], 1000) == [[1, 3], [4, 0, 2]]
    assert micro_batches([30, 40, 30, 35, 40], 1000) == [[1, 4, 3, 0, 2]]


@given(lengths_lists, st.integers(1, 500))
def test_the_batch_that_takes_the_most_memory_comes_first(lengths, budget):
    sizes = [padded(lengths, batch) for batch in micro_batches(lengths, budget)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("samples", [16, 64, 256])
@pytest.mark.parametrize("budget", [2048, 4096, 16384])
def test_lengths_like_those_of_gsm8k_are_padded_by_less_than_a_tenth(samples, budget):
    # Prompts and worked solutions in SmolLM2's tokens: medians of 57 and 113, log-normal spreads of 0.35 and 0.42.
    generator = np.random.default_rng(samples)
    for _ in range(20):
        prompts = generator.lognormal(np.log(57), 0.35, samples)
        lengths = (prompts + generator.lognormal(np.log(113), 0.42, samples)).astype(int).tolist()
        assert padding_share(lengths, micro_batches(lengths, budget)) < 0.1


def test_a_sample_over_the_budget_is_alone():
    assert micro_batches([50, 5, 5], 10) == [[0], [1, 2]]


def test_max_samples_alone_is_enough():
    assert micro_batches([1, 2, 3, 4, 5], max_samples=2) == [[4, 3], [2, 1], [0]]


def test_nothing_gives_no_batches():
    assert micro_batches([], 10) == []
    assert balance([], 3) == [[], [], []]


@given(lengths_lists, st.integers(1, 9))
def test_balance_gives_every_sample_to_one_part_with_sums_closer_than_the_longest(lengths, parts):
    shares = balance(lengths, parts)
    assert len(shares) == parts
    assert flat(shares) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert sums == sorted(sums, reverse=True)
    assert max(sums) - min(sums) <= max(lengths, default=0)
    assert all(shares) or len(lengths) < parts
    assert balance(list(lengths), parts) == shares


def longest_first(lengths: list[int], parts: int) -> list[int]:
    sums = [0] * parts
    for length in sorted(lengths, reverse=True):
        sums[sums.index(min(sums))] += length
    return sums


def test_balance_beats_longest_first_on_typical_batches():
    generator = random.Random(0)
    ours, theirs = 0, 0
    for _ in range(50):
        lengths = [generator.randint(30, 600) for _ in range(64)]
        sums = [sum(lengths[i] for i in share) for share in balance(lengths, 4)]
        ours += max(sums) - min(sums)
        reference = longest_first(lengths, 4)
        theirs += max(reference) - min(reference)
    assert ours < theirs / 3
    assert ours / 50 < 10


def test_balance_lets_sample_counts_differ():
    assert balance([110, 20, 20, 20, 20, 20], 2) == [[0], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("lengths", "batches", "share"),
    [
        ([4, 4], [[0, 1]], 0.0),
        ([4, 2], [[0, 1]], 0.25),
        ([4, 2], [[0], [1]], 0.0),
        ([], [], 0.0),
        ([1, 3, 8], [[0, 1], [2]], 1 / 7),
    ],
)
def test_padding_share_counts_padding_over_all_tokens(lengths, batches, share):
    assert padding_share(lengths, batches) == pytest.approx(share)


@pytest.mark.parametrize(
    "call",
    [
        lambda: micro_batches([1, 0], 5),
        lambda: micro_batches([1]),
        lambda: micro_batches([1], 0),
        lambda: micro_batches([1], max_samples=0),
        lambda: balance([1], 0),
        lambda: balance([-1], 1),
    ],
)
def test_senseless_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r">= 1|give token_budget"):
        call()
