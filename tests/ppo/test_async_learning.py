"""Sampling ahead costs no learning: over three seeds of the tiny task, old responses teach as much as fresh ones."""

import numpy as np
import pytest

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import LEARNING, run_config, scores_of

SEEDS = (0, 1, 2)
STEPS = 20


def learned(folder, staleness, seed):
    """(mean score of the first two steps, of the last three, largest age of a token)."""
    config = run_config(
        folder,
        f"async.max_staleness={staleness}",
        *LEARNING,
        "critic.kind=shared",
        "rollout.prompts_per_step=64",
        f"run.steps={STEPS}",
        f"run.seed={seed}",
        f"run.name=ahead-{staleness}-{seed}",
    )
    result = train_ppo(config)
    rows = [row for row in read_metrics(config.run.folder) if "objective/scores" in row]
    scores = scores_of(config)
    start, end = float(np.mean(scores[:2])), float(np.mean(scores[-3:]))
    oldest = max(row["sampling/staleness/max"] for row in rows)
    print(f"n = {staleness}, seed {seed}: {start:.3f} -> {end:.3f}, oldest {oldest:.0f}, {result.seconds:.0f} s", flush=True)
    return start, end, oldest


def last_scores(folder, staleness):
    runs = [learned(folder, staleness, seed) for seed in SEEDS]
    assert all(oldest == staleness for _, _, oldest in runs)
    assert all(end > start + 0.3 for start, end, _ in runs)
    return np.array([end for _, end, _ in runs])


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    return last_scores(tmp_path_factory.mktemp("synchronous"), 0)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("staleness", [1, 2])
def test_learning_from_old_responses_is_within_the_noise_of_the_seeds(tmp_path, synchronous, staleness):
    ahead = last_scores(tmp_path, staleness)
    noise = np.sqrt((ahead.var(ddof=1) + synchronous.var(ddof=1)) / len(SEEDS))
    assert ahead.mean() - synchronous.mean() > -max(2 * noise, 0.05)
