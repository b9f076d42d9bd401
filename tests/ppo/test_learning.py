"""Learning is shown and not assumed: the tiny model learns to say digits, and learns nothing from shuffled rewards."""

import numpy as np
import pytest

from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import LEARNING, run_config, scores_of

SEEDS = (0, 1, 2)


def scores(folder, reward, seed):
    config = run_config(
        folder,
        f"reward.functions=[{{name: 'tests.ppo.runs:{reward}'}}]",
        *LEARNING,
        "critic.kind=shared",
        "rollout.prompts_per_step=64",
        "run.steps=12",
        f"run.seed={seed}",
        f"run.name={reward}-{seed}",
    )
    train_ppo(config)
    return scores_of(config)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_tiny_model_learns_from_its_reward_and_not_from_a_shuffled_one(tmp_path, seed):
    learned = scores(tmp_path, "digit_share", seed)
    shuffled = scores(tmp_path, "shuffled_digit_share", seed)
    start = np.mean(learned[:2])
    assert np.mean(learned[-3:]) > start + 0.3
    assert np.mean(shuffled[-3:]) < start + 0.1
