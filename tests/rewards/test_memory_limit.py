"""User code that takes too much memory is named in one line, and the process it ran in goes on."""

import resource

import numpy as np
import pytest

from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch
from rayrlhf.rewards.memory_limit import memory_limit
from rayrlhf.rewards.score import score_batch

BATCH = ScoringBatch(prompts=["a", "b"], responses=["c", "d"])


def greedy(gib):
    def function(responses):
        held = [bytearray(2**26) for _ in range(int(gib * 16))]
        return [float(len(held))] * len(responses)

    return BoundFunction("greedy", function, 1.0, {})


def test_a_function_that_takes_more_than_its_share_is_named_and_one_that_does_not_is_left_alone():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(0.5):
        with pytest.raises(UserError, match="reward function 'greedy' raised MemoryError"):
            score_batch([greedy(1)], BATCH)
        assert score_batch([greedy(0.25)], BATCH).scores.tolist() == [4.0, 4.0]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert np.ones(2**27, np.uint8).sum() == 2**27


def test_arrays_count_as_well():
    with memory_limit(0.25), pytest.raises(MemoryError):
        np.ones(2**30, np.uint8)


def test_without_a_limit_nothing_changes():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
