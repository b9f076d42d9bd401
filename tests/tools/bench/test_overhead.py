"""What of a step no call covers."""

import pytest

from rayrlhf.tools.bench.overhead import bench_overhead, idle_shares
from rayrlhf.tools.bench.ppo_step import write_reward_model
from rayrlhf.tools.bench.work import PPOWork


@pytest.mark.parametrize(
    ("calls", "share"),
    [
        ([], 1.0),
        ([(0.0, 10.0)], 0.0),
        ([(-5.0, 1.0), (9.0, 20.0)], 0.8),
        ([(2.0, 4.0), (3.0, 5.0), (2.5, 3.0)], 0.7),
        ([(6.0, 8.0), (0.0, 2.0)], 0.6),
        ([(20.0, 30.0)], 1.0),
    ],
)
def test_the_idle_share_is_what_no_call_covers_however_they_overlap(calls, share):
    assert idle_shares([(0.0, 10.0)], calls) == pytest.approx([share])


def test_every_step_is_judged_by_itself():
    assert idle_shares([(0.0, 2.0), (2.0, 4.0)], [(1.0, 3.5)]) == pytest.approx([0.5, 0.25])


@pytest.mark.nightly
def test_ray_tells_when_the_actors_of_a_small_run_computed(tmp_path):
    policy, reward = write_reward_model("builtin:tiny?layers=1&hidden=64", tmp_path / "reward")
    work = PPOWork(policy, reward, "float32", prompts=8, new_tokens=8, epochs=1, updates=2)
    shares = bench_overhead(work, critic="shared", rounds=1)
    assert len(shares) == 2
    assert all(0.0 < share < 1.0 for share in shares)
