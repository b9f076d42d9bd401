"""Sampling and weight sync measured on real actors with a tiny model."""

import pytest

from rayrlhf.tools.bench.rollout_speed import bench_rollout
from rayrlhf.tools.bench.sync_speed import COPY, MANY, ONE, WHOLE, bench_sync
from rayrlhf.tools.bench.update_speed import bench_training

TINY = "builtin:tiny?layers=1&hidden=64&context=256"


@pytest.mark.nightly
def test_sampling_is_measured_next_to_vllm_and_transformers():
    found = bench_rollout(TINY, new_tokens=8, rounds=1, transformers=True)
    assert list(found.speeds) == ["plain vLLM", "rayrlhf rollout actor", "transformers generate"]
    assert all(speed > 0 for (speed,) in found.speeds.values())


@pytest.mark.nightly
def test_a_weight_sync_is_measured_next_to_a_copy_and_its_transport():
    found = bench_sync(TINY, rounds=1)
    assert list(found.speeds) == [COPY, ONE, MANY, WHOLE]
    assert found.median(COPY) > found.median(ONE) > found.median(WHOLE)


@pytest.mark.nightly
def test_an_optimizer_step_is_measured_next_to_a_bare_one():
    found = bench_training(TINY, samples=4, rounds=1)
    assert list(found.speeds) == ["plain torch step", "rayrlhf policy update"]
    assert all(speed > 0 for (speed,) in found.speeds.values())
