"""Optimizer steps: a pure function of (seed, epoch, step) that shows every sample once an epoch and respects its size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.supervised.optimizer_steps import BatchPlan, BatchSize, epoch_batches

lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=60)
sizes = st.builds(BatchSize, samples=st.integers(4, 20), fewest=st.integers(1, 4)) | st.builds(
    BatchSize, tokens=st.integers(1, 200), fewest=st.integers(1, 4)
)


@given(lengths_of, sizes, st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_an_epoch_shows_every_sample_once(lengths, size, seed, epoch, shuffle):
    batches = epoch_batches(lengths, size, seed=seed, epoch=epoch, shuffle=shuffle)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches == epoch_batches(lengths, size, seed=seed, epoch=epoch, shuffle=shuffle)
    if not shuffle:
        assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    assert all(len(batch) >= size.fewest for batch in batches) or len(batches) == 1


@given(lengths_of, st.integers(1, 20))
def test_steps_of_samples_have_that_many_but_the_last(lengths, samples):
    batches = epoch_batches(lengths, BatchSize(samples=samples), seed=0, epoch=0)
    assert [len(batch) for batch in batches[:-1]] == [samples] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= samples


@given(lengths_of, st.integers(1, 200))
def test_steps_of_tokens_are_full_but_not_over(lengths, tokens):
    batches = epoch_batches(lengths, BatchSize(tokens=tokens), seed=0, epoch=0)
    totals = [sum(lengths[index] for index in batch) for batch in batches]
    for batch, total, following in zip(batches, totals, [*batches[1:], None], strict=True):
        assert total <= tokens or len(batch) == 1
        assert following is None or total + lengths[following[0]] > tokens


@given(lengths_of, sizes, st.integers(1, 3), st.integers(0, 5))
def test_a_plan_gives_any_step_without_those_before_it(lengths, size, epochs, seed):
    plan = BatchPlan(lengths, size, seed=seed, epochs=epochs)
    batches = [batch for epoch in range(epochs) for batch in epoch_batches(lengths, size, seed=seed, epoch=epoch)]
    assert plan.total_steps == len(batches)
    for step in reversed(range(len(batches))):
        assert BatchPlan(lengths, size, seed=seed, epochs=epochs).batch(step) == plan.batch(step) == batches[step]


@given(lengths_of, sizes, st.integers(1, 30))
def test_a_plan_of_steps_goes_over_the_data_as_often_as_it_needs(lengths, size, steps):
    plan = BatchPlan(lengths, size, seed=1, epochs=1, steps=steps)
    assert plan.total_steps == steps
    seen = [plan.epoch_of(step) for step in range(steps)]
    assert seen == sorted(seen)
    longer = BatchPlan(lengths, size, seed=1, epochs=seen[-1] + 1)
    assert [plan.batch(step) for step in range(steps)] == [longer.batch(step) for step in range(steps)]


def test_seeds_and_epochs_have_orders_of_their_own():
    size = BatchSize(samples=100)
    orders = [tuple(epoch_batches([1] * 100, size, seed=seed, epoch=epoch)[0]) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_the_short_end_of_an_epoch_goes_to_the_step_before_it():
    batches = epoch_batches([1] * 9, BatchSize(samples=4, fewest=2), seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [4, 5]


def test_a_step_has_one_kind_of_size_and_a_run_has_an_end():
    for arguments in (
        {},
        {"samples": 1, "tokens": 1},
        {"samples": 0},
        {"tokens": -1},
        {"samples": 1, "fewest": 0},
        {"samples": 1, "fewest": 2},
    ):
        with pytest.raises(ValueError, match=r"give samples or tokens|must be >= "):
            BatchSize(**arguments)
    with pytest.raises(ValueError, match="no samples"):
        BatchPlan([], BatchSize(samples=1), seed=0)
    plan = BatchPlan([1, 1], BatchSize(samples=1), seed=0)
    for step in (-1, 2):
        with pytest.raises(IndexError, match=f"step {step} of a run of 2 steps"):
            plan.batch(step)
